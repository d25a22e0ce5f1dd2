"""What a row of the table of options says, and what kind of value an option has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

Verb = Literal["merge", "plan", "verify", "inspect", "convert", "extract", "batch"]


class Required:
    """The default of an option that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Final = Required()


@dataclass(frozen=True, slots=True)
class Kind:
    """What kind of value an option has: its type, how it is parsed, and how the command shows it."""

    type: str
    """Annotation of the field, as Python spells it, without the None of a default."""

    parse: Callable[[Any], object] | None = None
    """Makes the field's value of whatever is given, or raises ``ValueError`` with a sentence; None takes it as it is."""

    metavar: str = ""
    """How the help shows the value; empty shows the choices."""

    choices: tuple[str, ...] = ()
    """Values that the command completes; it refuses all others by itself."""

    is_many: bool = False
    """True where it may be given several times; the field is a tuple."""

    is_path: bool = False
    """True for a path or the name of a repo."""

    accepts: str = ""
    """Annotation of the keyword in Python, where it does not follow from the rest."""

    file: Literal["", "existing", "new", "any"] = ""
    """What the command checks of a path: an existing file; no directory; nothing that is there and unreadable."""

    @property
    def python_type(self) -> str:
        """Return the annotation of Python's keyword, which takes more than the field: ``Path`` for a path, say."""
        if self.accepts:
            return self.accepts
        if self.is_many:
            return "str | Sequence[str]"
        return "str | PathLike[str]" if self.is_path else self.type


@dataclass(frozen=True, slots=True)
class Option:
    """One option of one or several verbs, and everything that is said about it anywhere."""

    name: str
    """Of the request's field, of the key in YAML and of the keyword in Python, where nothing below says otherwise."""

    verbs: tuple[Verb, ...]
    kind: Kind

    help: str
    """Sentences of the command's help and of the generated docstrings."""

    note: str = ""
    """What the command's help adds in brackets: ``default: 0.5``."""

    default: object = None
    """The field's value where nothing is given; `REQUIRED` where something must be."""

    scope: Literal["request", "command"] = "request"
    """``command``: of the command alone, and no field of a request (``--json``)."""

    recorded: Literal["", "given", "always"] = ""
    """How a manifest records an option that shapes the output; empty where it does not shape it. What is recorded counts
    where an output is checked to be up to date, and for ``--resume``."""

    recorded_with: str = ""
    """Name of an option: this one has an effect, and is recorded, only where that one is."""

    flag: str = ""
    """Name on the command line, where it does not follow from the field's: ``--for``."""

    short: str = ""
    """One letter for it: ``-q``."""

    sets: str = ""
    """Value that the flag stands for by itself: ``--split-experts`` is ``split``, of ``experts``."""

    can_be_off: bool = False
    """True for a switch with a ``--no-…`` beside it, so that the command line can undo what a file says."""

    is_positional: bool = False
    """True where the command takes it by its place."""

    environment: str = ""
    """Variable that the command reads where the option is not given."""

    yaml_key: str = ""
    """Key in a batch file, where it is another."""

    has_wildcards: bool = False
    """True where a batch file may name many directories at once: ``runs/*``."""

    keyword: str = ""
    """Name in Python, where it is another."""

    in_python: bool = True
    """False for a field that the verb's function in Python does not take."""

    is_secret: bool = False
    """True for what no message and no ``repr`` may repeat."""

    @property
    def is_required(self) -> bool:
        """Return True where there is no request without it."""
        return isinstance(self.default, Required)

    @property
    def is_switch(self) -> bool:
        """Return True where it is on or off."""
        return self.kind.type == "bool"

    @property
    def key(self) -> str:
        """Return its key in a YAML file."""
        return self.yaml_key or self.name

    @property
    def python_name(self) -> str:
        """Return its keyword in Python."""
        return self.keyword or self.name
