"""The command line of a run, put together from its options: what to type to do the same again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from shlex import quote
from typing import TYPE_CHECKING, Any

from lora_merge.requests.table import options_of

if TYPE_CHECKING:
    from lora_merge.requests.option import Option, Verb


def command_text(verb: Verb, values: Mapping[str, Any]) -> str:
    """Return a command line, quoted for a shell. Secrets and defaults are left out.

    Args:
        verb: the command.
        values: of its options, by their names in the table.

    Example:
        >>> command_text("verify", {"out": "my model", "level": "full", "forward": True, "token": "hf_x"})
        "lora-merge verify 'my model' --level full --forward"
    """
    words = ["lora-merge", verb]
    seen: set[str] = set()
    for option in options_of(verb):
        value = values.get(option.name)
        if option.name in seen or option.is_secret or value in (None, (), option.default):
            continue
        if option.sets and value != option.sets:
            continue
        seen.add(option.name)
        words += _words(option, value)
    return " ".join(words)


def _words(option: Option, value: Any) -> Iterable[str]:
    """Yield the words of one option."""
    if option.is_positional:
        return [quote(str(value))]
    flag = option.flag or f"--{option.name.replace('_', '-')}"
    if option.sets:
        return [flag]
    if option.is_switch:
        return [flag if value else f"--no-{flag[2:]}"] if value or option.can_be_off else []
    many = value if isinstance(value, tuple | list) else (value,)
    return [word for one in many for word in (flag, quote(str(one)))]
