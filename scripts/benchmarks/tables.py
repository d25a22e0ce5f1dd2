"""Tables of results, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from benchmarks.machine import machine_line
from benchmarks.results import Outcome, Results, is_ours

if TYPE_CHECKING:
    from pathlib import Path

FLAT = 1.1
"""Peak memory that grows by less from size to size is called flat."""

CACHE_NOTES = {
    "warm": "all inputs are read before every run",
    "cold": "all inputs are put out of it before every run; programs and libraries stay in it",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one case."""

    outcome: Outcome
    name: str

    def middle(self, quantity: str) -> float | None:
        """Return the median of a quantity."""
        return self.outcome.middle(self.name, quantity)

    def ratio(self, other: str | None, quantity: str, of: str | None = None) -> float | None:
        """Return the median ratio to another contender, round by round."""
        return self.outcome.ratio(self.name, other, quantity, of) if other else None

    @property
    def first_ours(self) -> str | None:
        """Return the first contender that is lora-merge: others are compared with it."""
        return next(iter(self.outcome.ours()), None)


@dataclass(frozen=True, slots=True)
class Column:
    """A column: what stands in it for a row."""

    heading: str
    text: Callable[[Row], str]
    short: str = ""
    """The heading in a terminal, where it is another one."""


def number(value: float | None, digits: int = 2) -> str:
    """Return a number as text, with fewer digits from 100 on; nothing where there is none."""
    return "" if value is None else f"{value:.{digits if value < 100 else 0}f}"


def megabytes(value: float | None) -> str:
    """Return bytes in 10⁶."""
    return "" if value is None else f"{value / 1e6:.0f}"


BASE = Column("base, GB", lambda row: f"{row.outcome.base_bytes / 1e9:.2f}")
TARGETS = Column("targets", lambda row: row.outcome.case.targets)
RANK = Column("rank", lambda row: str(row.outcome.case.rank))
DTYPE = Column("dtype", lambda row: row.outcome.case.dtype)
SHARE = Column("merged, %", lambda row: f"{100 * row.outcome.merged_share:.0f}")
WHO = Column("contender", lambda row: row.name)
WHOLE = Column("whole process, s", lambda row: number(row.middle("wall_s")), "whole s")
WHOLE_CP = Column("× cp", lambda row: number(row.ratio("cp", "wall_s")))
WHOLE_OURS = Column("× ours", lambda row: number(row.ratio(row.first_ours, "wall_s")))
PHASE = Column("merge phase, s", lambda row: number(row.middle("merge_phase_s")), "phase s")
PHASE_CP = Column("merge phase × cp", lambda row: number(row.ratio("cp", "merge_phase_s", "wall_s")), "× cp")
DISK = Column("on the disk, s", lambda row: number(row.middle("durable_s")), "disk s")
DISK_CP = Column("on the disk × cp", lambda row: number(row.ratio("cp", "durable_s")), "× cp")
DISK_OURS = Column("on the disk × ours", lambda row: number(row.ratio(row.first_ours, "durable_s")))
CPU = Column("CPU, s", lambda row: number(row.middle("cpu_s"), 1), "CPU s")
PEAK = Column("peak memory, MB", lambda row: megabytes(row.middle("peak_rss_bytes")), "peak MB")
PART = Column("its merge part, s", lambda row: number(row.middle("merge_part_s")))
N_ROUNDS = Column("rounds", lambda row: str(len(row.outcome.values(row.name, "wall_s"))))
PHASE_GAIN = Column("merge phase, speed-up", lambda row: number(speed_up(row, "merge_phase_s")))
PART_GAIN = Column("merge part, speed-up", lambda row: number(speed_up(row, "merge_part_s")))


def speed_up(row: Row, quantity: str) -> float | None:
    """Return how much faster lora-merge is than with the first number of workers, of the same kind of adapter."""
    kind = row.name.rpartition("-")[0]
    same = [name for name in row.outcome.ours() if name.rpartition("-")[0] == kind]
    return row.outcome.ratio(same[0], row.name, quantity) if same else None


def compared(row: Row) -> str:
    """Return what a contender's output is beside ours."""
    found = row.outcome.differences.get(row.name)
    return str(found) if found else ""


OUTPUT = Column("output, compared with ours", compared)


EVERYTHING = (N_ROUNDS, WHOLE, WHOLE_CP, PHASE, PHASE_CP, DISK, DISK_CP, CPU, PEAK)
VARYING = (BASE, TARGETS, RANK, DTYPE)
"""Columns that stand in a table when they differ from row to row."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A table of the page."""

    always: tuple[Column, ...]
    """Columns in front, beside those that vary."""

    columns: tuple[Column, ...]
    wanted: Callable[[str], bool]
    """Whether a contender has rows, by its name."""


KINDS = {
    "sizes": Kind((BASE,), (WHO, WHOLE, WHOLE_CP, PHASE, PHASE_CP, DISK, DISK_CP, PEAK), lambda _: True),
    "peers": Kind(
        (), (WHO, N_ROUNDS, WHOLE, WHOLE_OURS, DISK, DISK_OURS, PEAK, OUTPUT), lambda name: name != "cp"
    ),
    "targets": Kind((TARGETS, RANK), (SHARE, WHO, PHASE, PHASE_CP, WHOLE, WHOLE_CP, DISK_CP, PEAK), is_ours),
    "workers": Kind((BASE,), (WHO, PHASE, PHASE_GAIN, PART, PART_GAIN, WHOLE, PEAK), is_ours),
}
"""By the name of the markers around them."""


def rows_of(results: Results, wanted: Callable[[str], bool] = lambda _: True) -> list[Row]:
    """Return a row for every contender on every case."""
    return [Row(outcome, name) for outcome in results.outcomes for name in outcome.names() if wanted(name)]


def markdown(name: str, results: Results) -> str:
    """Return a table of the page, with its notes; `name` is one of `KINDS`."""
    kind = KINDS[name]
    rows = rows_of(results, kind.wanted)
    varying = [column for column in VARYING if len({column.text(row) for row in rows}) > 1]
    leading = [column for column in VARYING if column in kind.always or column in varying]
    columns = (*leading, *kind.columns)
    lines = [[column.heading for column in columns], [rule(column) for column in columns]]
    lines += [[column.text(row) for column in columns] for row in rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [*notes_of(results, rows, leading), *(flatness(results) if name == "sizes" else ())]
    return "\n\n".join([table, "\n".join(f"- {note}" for note in notes)])


def rule(column: Column) -> str:
    """Return what stands under a heading: numbers are on the right."""
    return "---" if column in (WHO, TARGETS, DTYPE, OUTPUT) else "---:"


def notes_of(results: Results, rows: list[Row], leading: list[Column]) -> Iterator[str]:
    """Yield what a table cannot show: what was measured, what others are, where from."""
    fixed = [
        f"{column.heading} {column.text(rows[0])}" for column in VARYING if rows and column not in leading
    ]
    if fixed:
        yield f"All rows: {'; '.join(fixed)}."
    yield from method_of(results)
    yield from others_of(results, {row.name for row in rows})
    yield f"`{results.command}`, {results.date}."
    yield f"{machine_line(results.machine)}."


def method_of(results: Results) -> Iterator[str]:
    """Yield how the numbers were taken."""
    n_rounds = max((len(outcome.rounds) for outcome in results.outcomes), default=0)
    yield (
        f"Medians of {n_rounds} rounds, in each of which everyone runs once, one after the other; ratios are taken in"
        f" each round. Page cache {results.cache}: {CACHE_NOTES[results.cache]}."
    )
    yield (
        "The whole process includes start-up, and for lora-merge verification and the flush of its output;"
        " the merge phase is copying and merging, as lora-merge times them."
    )


def others_of(results: Results, shown: set[str]) -> Iterator[str]:
    """Yield what other tools are, and why some took no part."""
    for name, versions in results.versions.items():
        if name in shown:
            yield f"{name}: {', '.join(f'{package} {version}' for package, version in versions.items())}."
    for outcome in results.outcomes:
        for name, why in outcome.failures.items():
            yield f"{name} at {outcome.case}: {why}."


def flatness(results: Results) -> Iterator[str]:
    """Yield whether our peak memory depends on the size of the model."""
    peaks: dict[str, dict[float, float]] = {}
    for outcome in results.outcomes:
        for name in outcome.ours():
            peak = outcome.middle(name, "peak_rss_bytes") or 0.0
            sizes = peaks.setdefault(name, {})
            sizes[outcome.case.size_gb] = max(peak, sizes.get(outcome.case.size_gb, 0.0))
    for name, sizes in peaks.items():
        if len(sizes) > 1:
            verdict = "flat" if max(sizes.values()) <= FLAT * min(sizes.values()) else "not flat"
            steps = ", ".join(f"{megabytes(peak)} MB at {size:g} GB" for size, peak in sizes.items())
            yield f"Peak memory of {name} is {verdict}: {steps}."


def console_table(outcome: Outcome) -> Table:
    """Return the measurements of one case for a terminal."""
    table = Table(title=f"{outcome.case}: medians", box=box.SIMPLE)
    table.add_column(WHO.heading, no_wrap=True)
    for column in EVERYTHING:
        table.add_column(column.short or column.heading, justify="right", no_wrap=True)
    for name in outcome.names():
        row = Row(outcome, name)
        table.add_row(name, *(column.text(row) for column in EVERYTHING))
    return table


def console_notes(outcome: Outcome) -> Iterator[str]:
    """Yield what the terminal's table of one case cannot show."""
    for name in outcome.ours():
        if phases := outcome.phases(name):
            yield f"{name}: {', '.join(f'{phase} {seconds:.2f} s' for phase, seconds in phases.items())}"
        row = Row(outcome, name)
        gains = speed_up(row, "merge_phase_s"), speed_up(row, "merge_part_s")
        if gains[0] is not None and gains[1] is not None and gains != (1, 1):
            yield f"{name}: merge phase {gains[0]:.2f} × as fast as with the first number of workers, merge part {gains[1]:.2f} ×"
    for name, found in outcome.differences.items():
        yield f"{name} compared with ours: {found}"
    for name, why in outcome.failures.items():
        yield f"{name} took no part: {why}"


def replace_block(text: str, name: str, block: str) -> str:
    """Return a page with a block between its markers ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.

    Raises:
        ValueError: the page does not have these two markers once each, in this order.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed or begin in rest or end in before + after:
        raise ValueError(f"the page needs {begin} and {end}, once each and in this order")
    return f"{before}{begin}\n\n{block}\n\n{end}{after}"


def write_block(page: Path, name: str, block: str) -> None:
    """Put a block between its markers in a page.

    Raises:
        ValueError: see `replace_block`.
    """
    page.write_text(replace_block(page.read_text(), name, block))
