"""Python types made from the table of options.

``lora_merge/requests/request.py`` holds the requests, ``keywords.py`` the keywords of the public functions. They are source
files so that editors complete them and mypy checks them. `docs.py` writes them, or checks that they are current.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_merge.requests.table import fields_of, options_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_merge.requests.option import Option, Verb

FOLDER = Path(__file__).resolve().parents[1] / "lora_merge" / "requests"
WIDTH = 110

_REQUESTS: Final[Mapping[Verb, tuple[str, str]]] = {
    "merge": (
        "Request",
        "What to merge, into what, and how: the command's options, and the keys of a request file.",
    ),
    "verify": ("VerifyRequest", "Which output to hold to what, and how far to go."),
    "inspect": ("InspectRequest", "Which adapter to describe, and against which base."),
    "convert": ("ConvertRequest", "Which adapter to rewrite, and how."),
    "extract": ("ExtractRequest", "Which training to take apart into a LoRA."),
}

_KEYWORDS: Final[Mapping[Verb, str]] = {
    "plan": "PlanOptions",
    "merge": "MergeOptions",
    "verify": "VerifyOptions",
    "inspect": "InspectOptions",
    "convert": "ConvertOptions",
    "extract": "ExtractOptions",
}

_NOT_A_CHOICE = {"bool", "str", "int", "float", "AdapterPaths"}

_MADE = "Made from the table of options by `scripts/docs.py --write`; do not edit."


def request_module() -> str:
    """Return the text of ``lora_merge/requests/request.py``."""
    classes = [_request(verb, *about) for verb, about in _REQUESTS.items()]
    choices = _choices(option.kind.type for verb in _REQUESTS for option in fields_of(verb))
    head = (
        f'"""Requests, one class for each verb.\n\n{_MADE}\n"""\n\n'
        "from __future__ import annotations\n\n"
        "from dataclasses import dataclass, field\n"
        "from typing import ClassVar\n\n"
        f"from lora_merge.requests.choices import (\n{choices})"
    )
    return "\n\n\n".join([head, *classes]) + "\n"


def keywords_module() -> str:
    """Return the text of ``lora_merge/requests/keywords.py``."""
    classes = [_keywords(verb, name) for verb, name in _KEYWORDS.items()]
    choices = _choices(option.kind.type for verb in _KEYWORDS for option in fields_of(verb))
    return (
        f'"""Keywords of the public functions that have a default.\n\n{_MADE}\n"""\n\n'
        "from __future__ import annotations\n\n"
        "from typing import TYPE_CHECKING, Literal, TypedDict\n\n"
        "if TYPE_CHECKING:\n"
        "    from collections.abc import Sequence\n"
        "    from os import PathLike\n\n"
        f"    from lora_merge.requests.choices import (\n{textwrap.indent(choices, '    ')}    )\n"
        "    from lora_merge.requests.inputs import AdapterPaths\n\n\n" + "\n\n\n".join(classes) + "\n"
    )


def _choices(types: Iterable[str]) -> str:
    """Return the lines that import the choices among some types."""
    words = {word for text in types for word in text.split(" | ")}
    return "".join(f"    {word},\n" for word in sorted(words - _NOT_A_CHOICE) if not word.startswith("tuple"))


def _request(verb: Verb, name: str, about: str) -> str:
    fields = "\n\n".join(_field(option, verb) for option in fields_of(verb))
    strict = '    __pydantic_config__: ClassVar[dict[str, object]] = {"strict": True}'
    return f'@dataclass(frozen=True, slots=True)\nclass {name}:\n    """{about}"""\n\n{fields}\n\n{strict}'


def _field(option: Option, verb: Verb) -> str:
    line = f"    {option.name}: {_or_none(option.kind.type, option)}"
    if option.is_secret:
        line += f" = field(default={option.default!r}, repr=False)"
    elif not option.is_required:
        line += f" = {_literal(option.default)}"
    return f"{line}\n{_docstring(option, verb)}"


def _keywords(verb: Verb, name: str) -> str:
    rows = [option for option in fields_of(verb) if option.in_python and not option.is_required]
    base = "TypedDict, total=False"
    if verb == "merge":
        base = f"{_KEYWORDS['plan']}, total=False"
        rows = [option for option in rows if "plan" not in option.verbs or option not in fields_of("plan")]
    fields = "\n\n".join(
        f"    {option.python_name}: {_or_none(option.kind.python_type, option)}\n{_docstring(option, verb)}"
        for option in rows
    )
    return f'class {name}({base}):\n    """Keywords of `lora_merge.{verb}`."""\n\n{fields}'


def _or_none(kind: str, option: Option) -> str:
    return f"{kind} | None" if option.default is None else kind


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _docstring(option: Option, verb: Verb) -> str:
    """Return what the command's help says of an option, as the docstring of its field."""
    flags = [row for row in options_of(verb) if row.name == option.name and row.sets]
    sentences = " ".join(f"``{row.sets}``: {row.help}" for row in flags) or option.help
    if option.note.startswith("default: "):
        sentences += f" Default: {option.note.removeprefix('default: ')}."
    lines = textwrap.wrap(f'"""{sentences}"""', WIDTH - 4, break_on_hyphens=False, break_long_words=False)
    return textwrap.indent("\n".join(lines), "    ")
