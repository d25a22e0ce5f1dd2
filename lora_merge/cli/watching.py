"""Shows the progress of a batch: states and one bar on a terminal, lines in a log, JSON lines in a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.cli.layout import Cell, Column, Mark, grid
from lora_merge.cli.meter import Meter
from lora_merge.cli.progress import bar_text, glyphs, live
from lora_merge.cli.tables import STATES
from lora_merge.cli.voice import is_terminal, say, say_on
from lora_merge.merging.headline import announce
from lora_merge.redaction import fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Group
    from rich.live import Live

    from lora_merge.batches.event_log import EventLog
    from lora_merge.batches.reports import BatchObserver, State
    from lora_merge.merging.headline import Work

_MOST_SHOWN = 20
"""Most jobs that a terminal shows at a time; a small one shows fewer."""

_OTHER_LINES = 6
"""Lines of a terminal that are not for jobs: totals, heads, the line of the others, the bar, and room for messages."""

_CHOSEN: tuple[State, ...] = ("running", "failed", "not run", "planned", "waiting", "done", "kept")
"""Order in which jobs are chosen if there is no room for all."""


@contextlib.contextmanager
def watching_batch(names: Sequence[str], log: EventLog | None, *, quiet: bool) -> Iterator[BatchObserver]:
    """Yield an observer of a batch with these jobs; a log hears everything too."""
    # stdout is for results alone.
    with contextlib.redirect_stdout(sys.stderr):
        if not quiet and is_terminal():
            board = _Board(names)
            with board.live():
                yield _Logged(board, log) if log else board
            return
        plain = _Plain(quiet=quiet)
        yield _Logged(plain, log) if log else plain


class _Plain:
    """An observer that prints a line when a job begins and when it ends."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def begin(self, work: Work) -> None:
        """Print what is about to be made."""
        if not self._quiet:
            say(work.headline)

    def phase(self, name: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def done(self, name: str) -> None: ...

    def job(self, name: str, state: State, sentence: str = "") -> None:
        """Print a job's state, unless it only waits. Why it failed is said at the end, with what to do about it."""
        if self._quiet or state == "waiting" or (state == "planned" and not sentence):
            return
        first = sentence.partition("\n")[0] if state != "failed" else ""
        say(f"{state}: {name}: {first}" if first else f"{state}: {name}")


class _Board:
    """An observer that shows a table of jobs and one progress bar on a terminal."""

    def __init__(self, names: Sequence[str]) -> None:
        self._states: dict[str, State] = dict.fromkeys(names, "waiting")
        self._meter = Meter(time.monotonic())
        self._meter.enter("planning", 0, time.monotonic())
        self._nbytes: Mapping[str, int] = {}
        self._counted = 0
        self._live: Live | None = None

    @contextlib.contextmanager
    def live(self) -> Iterator[None]:
        """Show the display while the context lasts."""
        with live(self._board) as self._live:
            yield

    def _board(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        shown = self._live
        # rich asks once before it shows anything.
        if shown is None:
            return Group()
        width, height = shown.console.size
        lines = board_lines(self._states, width, height)
        bar = bar_text(self._meter, time.monotonic(), width, glyphs(shown))
        return Group(*(Text.from_ansi(line, no_wrap=True, overflow="crop") for line in lines), bar)

    def begin(self, work: Work) -> None:
        """Take over how many bytes each job has."""
        if self._live is not None:
            say_on(self._live, work.headline)
        self._nbytes, self._counted = work.n_bytes_of or {}, 0
        self._meter.begin(work.total_bytes, time.monotonic())

    def phase(self, name: str, total_bytes: int) -> None:
        """Show the phase of the group that is being made; the bar stays that of all."""
        self._meter.enter(fit(name), total_bytes, time.monotonic())

    def advance(self, nbytes: int) -> None:
        self._counted += nbytes
        self._meter.add(nbytes, time.monotonic())

    def done(self, name: str) -> None: ...

    def job(self, name: str, state: State, sentence: str = "") -> None:
        """Take over a state. Jobs that other processes make are heard of here only, so their bytes are added here."""
        del sentence
        self._states[name] = state
        finished = sum(self._nbytes.get(job, 0) for job, one in self._states.items() if one == "done")
        if finished > self._counted:
            self._meter.is_sized = True
            self.advance(finished - self._counted)


def board_lines(states: Mapping[str, State], width: int, height: int) -> list[str]:
    """Return the table of jobs that fits a terminal: those that run are shown, and the rest is counted.

    Args:
        states: job → state, in the order of the batch.
        width: of the terminal.
        height: of the terminal.
    """
    counts = Counter(states.values())
    totals = ", ".join(f"{counts[state]} {state}" for state in _CHOSEN if counts[state])
    room = max(1, min(_MOST_SHOWN, height - _OTHER_LINES))
    # Chosen by state, shown in the order of the batch.
    ranked = sorted(states, key=lambda name: _CHOSEN.index(states[name]))
    chosen = set(ranked[:room])
    rows: list[tuple[Cell, ...]] = [
        (name, Mark(state, STATES[state]) if state in STATES else state)
        for name, state in states.items()
        if name in chosen
    ]
    rest = Counter(states[name] for name in ranked[room:])
    others = ", ".join(f"{n} {state}" for state, n in rest.items())
    lines = [totals, *grid([Column("job"), Column("state")], rows, width - 1)]
    return [*lines, f"  … and {others}"] if others else lines


class _Logged:
    """An observer that passes everything on to another one, and writes phases and jobs to a log."""

    def __init__(self, other: BatchObserver, log: EventLog) -> None:
        self._other, self._log = other, log

    def begin(self, work: Work) -> None:
        announce(self._other, work)

    def phase(self, name: str, total_bytes: int) -> None:
        self._log.add("phase", name=name, total_bytes=total_bytes)
        self._other.phase(name, total_bytes)

    def advance(self, nbytes: int) -> None:
        # Not logged: a line for each tile would be too many.
        self._other.advance(nbytes)

    def done(self, name: str) -> None:
        self._other.done(name)

    def job(self, name: str, state: State, sentence: str = "") -> None:
        self._log.add("job", name=name, state=state, **({"message": sentence} if sentence else {}))
        self._other.job(name, state, sentence)
