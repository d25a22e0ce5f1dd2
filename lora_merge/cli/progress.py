"""Shows the progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from lora_merge.cli.voice import is_terminal, say, screen
from lora_merge.core.report import Silence
from lora_merge.redaction import fit
from lora_merge.words import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress, ProgressColumn, TaskID

    from lora_merge.core.report import Observer

_LINE_SECONDS = 10.0  # between plain progress lines, where there is no terminal


@contextlib.contextmanager
def watching(*, quiet: bool, verbose: bool) -> Iterator[Observer]:
    """Yield an observer of a run."""
    # stdout is for results alone. What libraries print there goes where their warnings go.
    with contextlib.redirect_stdout(sys.stderr):
        if quiet:
            yield Silence()
        elif is_terminal():
            with _progress() as progress:
                yield _Bar(progress, verbose=verbose)
        else:
            yield _Lines(verbose=verbose)


def bar(*more: ProgressColumn) -> Progress:
    """Return a progress bar for bytes, on stderr. It disappears when it ends."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        *more,
        console=screen(stderr=True),
        transient=True,
        # Otherwise rich would print the output of libraries as it is, control characters included.
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _progress() -> Progress:
    from rich.progress import TimeRemainingColumn

    return bar(TimeRemainingColumn())


class _Bar:
    """An observer that moves a progress bar; with ``verbose`` it prints the name of each tensor."""

    def __init__(self, progress: Progress, *, verbose: bool) -> None:
        self._progress, self._verbose = progress, verbose
        self._task: TaskID | None = None

    def phase(self, name: str, total_bytes: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        # Without a total, the bar only shows that something happens.
        self._task = self._progress.add_task(fit(name), total=total_bytes or None)

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._progress.advance(self._task, nbytes)

    def done(self, name: str) -> None:
        if self._verbose:
            self._progress.console.print(fit(name))


class _Lines:
    """An observer for logs: prints a line when a phase begins, then one every `_LINE_SECONDS`."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._name, self._total, self._done = "", 0, 0
        self._began = self._spoke = time.monotonic()

    def phase(self, name: str, total_bytes: int) -> None:
        self._name, self._total, self._done = name, total_bytes, 0
        self._began = self._spoke = time.monotonic()
        say(f"{name} …" if not total_bytes else f"{name} {size_text(total_bytes)} …")

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._spoke >= _LINE_SECONDS:
            self._spoke = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate if rate else 0
            share = f"{size_text(self._done)} of {size_text(self._total)}"
            say(f"{self._name}: {share}, {size_text(rate)}/s, {left:.0f} s left")

    def done(self, name: str) -> None:
        if self._verbose:
            say(f"  {name}")
