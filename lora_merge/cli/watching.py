"""Shows the progress of a batch: states and one bar on a terminal, lines in a log, JSON lines in a file."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.cli.progress import bar
from lora_merge.cli.voice import add_row, caption, is_terminal, say, screen, styled, table
from lora_merge.redaction import fit
from lora_merge.words import cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Group

    from lora_merge.batches.event_log import EventLog
    from lora_merge.batches.reports import BatchObserver, State

_SHOWN = 20
"""Most jobs that a terminal shows at a time."""

STYLES: dict[State, str] = {
    "waiting": "dim",
    "planned": "dim",
    "running": "cyan",
    "done": "green",
    "kept": "green",
    "failed": "red",
    "not run": "yellow",
}

_ORDER = ("running", "failed", "planned", "waiting", "done", "kept", "not run")
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

    def phase(self, name: str, total_bytes: int) -> None: ...

    def advance(self, nbytes: int) -> None: ...

    def done(self, name: str) -> None: ...

    def job(self, name: str, state: State, sentence: str = "") -> None:
        """Print a job's state, unless it only waits."""
        if self._quiet or state == "waiting" or (state == "planned" and not sentence):
            return
        first = sentence.partition("\n")[0]
        say(f"{state}: {name}: {first}" if first else f"{state}: {name}")


class _Board:
    """An observer that shows a table of jobs and a progress bar on a terminal."""

    def __init__(self, names: Sequence[str]) -> None:
        self._states: dict[str, State] = dict.fromkeys(names, "waiting")
        self._progress = bar()
        self._task = self._progress.add_task("planning", total=None)

    def live(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which the display is shown."""
        from rich.live import Live

        return Live(
            get_renderable=self._board,
            console=screen(stderr=True),
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _board(self) -> Group:
        from rich.console import Group

        counts = Counter(self._states.values())
        made = table("job", "state", title=", ".join(f"{n} {state}" for state, n in counts.items()))
        # Chosen by state, shown in the order of the batch.
        first = sorted(self._states, key=lambda name: _ORDER.index(self._states[name]))[:_SHOWN]
        for name in (name for name in self._states if name in first):
            state = self._states[name]
            add_row(made, name, styled(state, STYLES[state]))
        if len(self._states) > _SHOWN:
            caption(made, cut(_SHOWN, len(self._states)))
        return Group(made, self._progress)

    def phase(self, name: str, total_bytes: int) -> None:
        """Start the bar again for a new phase."""
        self._progress.reset(self._task, description=fit(name), total=total_bytes or None)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)

    def done(self, name: str) -> None: ...

    def job(self, name: str, state: State, sentence: str = "") -> None:
        del sentence
        self._states[name] = state


class _Logged:
    """An observer that passes everything on to another one, and writes phases and jobs to a log."""

    def __init__(self, other: BatchObserver, log: EventLog) -> None:
        self._other, self._log = other, log

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
