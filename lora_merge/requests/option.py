"""One row of the table of options, and the kind of value that it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

Names = Callable[[], tuple[str, ...]]
"""Returns the keys of a table."""

Verb = Literal["merge", "plan", "verify", "inspect", "convert", "extract", "batch", "doctor", "completion"]


class Required:
    """Marks an option without a default: a request cannot be made without it."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = Required()


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of value that an option has: its type, its parser, and how the command shows it."""

    type: str
    """Annotation of the field, as Python spells it, without the None of a default."""

    parse: Callable[[Any], object] | None = None
    """Returns the field's value for a value from YAML, Python or the command line, or raises ``ValueError`` with a sentence.
    None keeps the value as it is."""

    metavar: str = ""
    """How the help shows the value; empty shows the choices."""

    choices: tuple[str, ...] = ()
    """Values that the command completes. It refuses all others before the parser sees them."""

    names: Names | None = None
    """Of the table that has the value as a key. They are asked for whenever they are needed, and not before: a new member is one line
    in its table, and a table is not imported for a command that has no use for it."""

    is_completed: bool = False
    """True if the command completes `names`. It refuses all others before the parser sees them, as with `choices`."""

    is_many: bool = False
    """True if it may be given several times; the field is a tuple."""

    is_path: bool = False
    """True for a path or the name of a repo."""

    accepts: str = ""
    """Annotation of the keyword in Python, if it does not follow from the fields above."""

    file: Literal["", "existing", "new", "any"] = ""
    """What the command checks about a path: ``existing``, a file that is there; ``new``, not a directory; ``any``, readable if it
    is there. Empty checks nothing."""

    @property
    def words(self) -> tuple[str, ...]:
        """Values that a shell can offer; empty where there is no fixed set."""
        if self.choices or self.names is not None:
            return self.choices or (self.names() if self.names is not None else ())
        shown = self.metavar.strip("[]") if self.metavar.startswith("[") else ""
        # ``cuda:N`` is a pattern, not a value.
        return tuple(word for word in shown.split("|") if word and not word.endswith(":N"))

    @property
    def python_type(self) -> str:
        """Annotation of the keyword in Python. It takes more than the field: ``Path`` objects, one text for a list."""
        if self.accepts:
            return self.accepts
        if self.is_many:
            return "str | Sequence[str]"
        if self.names is not None:
            keys = ", ".join(f'"{name}"' for name in self.names())
            return f"Literal[{keys}]"
        return "str | PathLike[str]" if self.is_path else self.type


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one or several verbs, and everything that is said about it anywhere."""

    name: str
    """The request's field. YAML, Python and the command line use the same name, unless a field below gives another."""

    verbs: tuple[Verb, ...]
    kind: Kind

    help: str
    """Sentences of the command's help and of the generated docstrings."""

    note: str = ""
    """Added to the command's help, in brackets: ``default: 0.5``."""

    default: object = None
    """The field's value when nothing is given; `REQUIRED` if there is none."""

    scope: Literal["request", "command"] = "request"
    """``command``: the command alone has it; it is not a field of a request (``--json``)."""

    recorded: Literal["", "given", "always"] = ""
    """When the manifest records it: only if it differs from its default, or always. Empty for an option that does not shape
    the output. An output with other recorded values is not up to date, and ``--resume`` starts over."""

    recorded_with: tuple[str, ...] = ()
    """Names of other options. This one has an effect, and is recorded, only if one of them is."""

    flag: str = ""
    """Name on the command line, if it differs: ``--for``."""

    short: str = ""
    """A one-letter name: ``-q``."""

    sets: str = ""
    """Value that the flag sets: ``--split-experts`` sets ``experts`` to ``split``."""

    can_be_off: bool = False
    """True for a switch with a ``--no-…`` form, so that the command line can override a file."""

    is_positional: bool = False
    """True for an argument of the command that has no flag."""

    environment: str = ""
    """Environment variable that the command reads if the option is not given."""

    yaml_key: str = ""
    """Key in a batch file, if it differs."""

    has_wildcards: bool = False
    """True if a batch file may give a pattern that matches several directories: ``runs/*``."""

    keyword: str = ""
    """Name in Python, if it differs."""

    in_python: bool = True
    """False for a field that the Python function does not take."""

    instead: str = ""
    """Another option. Where it is given, this one need not be."""

    is_secret: bool = False
    """True for a value that messages and ``repr`` must not repeat."""

    @property
    def is_required(self) -> bool:
        """True if a request cannot be made without it."""
        return isinstance(self.default, Required)

    @property
    def is_switch(self) -> bool:
        """True for an option that is on or off."""
        return self.kind.type == "bool"

    @property
    def key(self) -> str:
        """The key in a YAML file."""
        return self.yaml_key or self.name

    @property
    def python_name(self) -> str:
        """The keyword in Python."""
        return self.keyword or self.name
