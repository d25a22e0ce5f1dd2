"""A page as values: a headline, a verdict, and sections of facts, notices, charts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lora_merge.drawing.heat_map import HeatMap

State = Literal["good", "warn", "bad", "plain"]
"""How a result is meant: it passed, passed with warnings, failed; ``"plain"`` where nothing was judged."""


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and a value."""

    name: str
    value: str
    is_code: bool = False
    """True for paths, digests and commands."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A list of facts."""

    template: ClassVar[str] = "facts"
    rows: tuple[Fact, ...]


@dataclass(frozen=True, slots=True)
class Notice:
    """An error, a warning or a note."""

    severity: str
    subject: str
    sentence: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Notices:
    """A list of notices, errors first."""

    template: ClassVar[str] = "notices"
    rows: tuple[Notice, ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A heat map, and the same values as a table."""

    template: ClassVar[str] = "chart"
    map: HeatMap
    caption: str


@dataclass(frozen=True, slots=True)
class Bar:
    """A number in a table, and the share of its column's largest, 0 to 1."""

    text: str
    share: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A result in a word, with a symbol before it."""

    text: str
    state: State


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and rows."""

    template: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Bar | Mark | tuple[str, ...], ...], ...]
    """A tuple in a cell is a list of lines."""

    numeric: frozenset[int] = frozenset()
    """Columns of numbers, which are aligned at the right."""

    code: frozenset[int] = frozenset()
    """Columns of paths and digests."""

    is_titled: bool = False
    """True where the title above it says what the caption says, so that only screen readers need that."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command that a reader may copy."""

    template: ClassVar[str] = "command"
    text: str


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence between other blocks."""

    template: ClassVar[str] = "remark"
    text: str


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a batch, which a reader opens."""

    template: ClassVar[str] = "job"
    name: str
    mark: Mark
    summary: str
    blocks: tuple[Block, ...]


Block = Facts | Notices | Chart | Table | Command | Remark | Job


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page with a title."""

    name: str
    """Its identifier in the page."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Page:
    """Everything that a page shows."""

    kind: str
    """``"Merge"``, ``"Verification"``, …"""

    headline: str
    state: State
    verdict: str
    figures: tuple[Fact, ...] = ()
    """The few numbers that matter most."""

    sections: tuple[Section, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    """The result as ``--json`` prints it."""


def section(name: str, title: str, *blocks: Block | None) -> Section | None:
    """Return a section of the blocks that have something to show; None if there is none."""
    shown = tuple(one for one in blocks if one is not None and getattr(one, "rows", True))
    return Section(name, title, shown) if shown else None


def sections(*found: Section | None) -> tuple[Section, ...]:
    """Return the sections that are there."""
    return tuple(one for one in found if one is not None)
