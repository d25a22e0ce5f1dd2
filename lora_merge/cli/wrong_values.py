"""Values that an option does not take, and options or arguments without a value: what was probably meant."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Final

import click

from lora_merge.cli.advice import NEAR, Advice, Reading, help_hint
from lora_merge.requests.table import options_of
from lora_merge.words import uncapitalised

if TYPE_CHECKING:
    from lora_merge.cli.arguments import Word
    from lora_merge.requests.option import Option

_VALUES: Final[dict[tuple[str, str], tuple[str, ...]]] = {
    ("--verify", "none"): ("--no-verify",),
    ("--verify", "off"): ("--no-verify",),
    ("--verify", "true"): (),
    ("--dtype", "auto"): (),
    ("--device", "gpu"): ("--device", "cuda"),
    ("--combine", "average"): ("--combine", "linear"),
    ("--combine", "sum"): ("--combine", "linear"),
    ("--combine", "weighted"): ("--combine", "linear"),
    ("--combine", "dare"): ("--combine", "dare_linear"),
    ("--quantize", "8bit"): ("--quantize", "int8"),
    ("--quantize", "4bit"): ("--quantize", "int4"),
    ("--rounding", "none"): ("--rounding", "nearest"),
    ("--for", "llama.cpp"): ("--for", "llamacpp"),
    ("--for", "ollama"): ("--for", "llamacpp"),
    ("--engine", "llama.cpp"): ("--engine", "llamacpp"),
}
"""Values that other tools have → the arguments to write here."""

_SHORT: Final = {"dtype": ("bf16", "fp16", "fp32")}
"""Short names of values, which are taken as well."""


def about_wrong_value(error: click.BadParameter, read: Reading) -> Advice | None:
    """Return the answer to a value that an option does not take: the command with the value that is nearest to it.

    None where no value is near, or the option has no fixed values.
    """
    param = error.param
    row = _row(read, param)
    if row is None or not isinstance(param, click.Option):
        return None
    for n, word in enumerate(read.words):
        value = word.values[0] if word.values else ""
        if word.name not in param.opts or value in row.kind.words:
            continue
        known = (*row.kind.words, *_SHORT.get(row.name, ()))
        arguments = _VALUES.get((word.name, value.lower()))
        # ``--engine`` of another command takes other values.
        if arguments and arguments[0] == word.name and arguments[1] not in known:
            arguments = None
        near = difflib.get_close_matches(value.lower(), known, 1, NEAR)
        if arguments is None and near:
            arguments = (word.name, near[0])
        if arguments is not None:
            before, after = read.words[:n], read.words[n + 1 :]
            tokens = [*_tokens(before), *arguments, *_tokens(after)]
            return Advice(error.format_message().rstrip("."), (read.line(tokens),))
    return None


def about_wrong_path(error: click.BadParameter) -> Advice:
    """Return the answer to a file that does not exist, or is not a file."""
    name = f"{error.param.opts[0]}: " if isinstance(error.param, click.Option) else ""
    return Advice(f"{name}{uncapitalised(error.message.rstrip('.'))}", ("check the path",))


def about_missing_argument(error: click.MissingParameter, read: Reading) -> Advice:
    """Return the answer to a command without its argument: the command with an example."""
    row = _row(read, error.param)
    if row is None:
        return Advice(error.format_message(), (help_hint(read),))
    example = row.kind.choices[0] if row.kind.choices else row.name.upper()
    values = f" ({', '.join(row.kind.choices)})" if row.kind.choices else ""
    # The help has a colon of its own, and a sentence has one.
    given = uncapitalised(row.help.rstrip(".")).replace(": ", ", ", 1)
    sentence = f"missing argument {row.name.upper()}: {given}{values}"
    return Advice(sentence, (read.line([*_tokens(read.words), example]),))


def about_missing_value(error: click.BadOptionUsage, read: Reading) -> Advice:
    """Return the answer to an option without its value: what it takes."""
    option = read.known.get(error.option_name)
    row = _row(read, option)
    if row is None:
        return Advice(error.format_message(), (help_hint(read),))
    values = ", ".join(row.kind.words) or row.kind.metavar
    first, _, _ = row.help.partition(". ")
    hint = f"{error.option_name} takes {values}: {first.rstrip('.')}"
    return Advice(f"`{error.option_name}` has no value", (hint,))


def _row(read: Reading, param: click.Parameter | None) -> Option | None:
    """Return the row of the table that a parameter of click was made from."""
    rows = options_of(read.verb)  # type: ignore[arg-type]  # the name of a command is a verb
    return next((row for row in rows if param is not None and row.name == param.name), None)


def _tokens(words: tuple[Word, ...]) -> list[str]:
    return [text for word in words for text in word.tokens]
