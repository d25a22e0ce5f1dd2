"""Shows the progress of a run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from lora_merge.cli.layout import cells, shortened
from lora_merge.cli.meter import Meter, clock_text
from lora_merge.cli.voice import drawn, is_terminal, say, say_on, say_raw, screen
from lora_merge.core.report import Silence
from lora_merge.redaction import fit
from lora_merge.words import size_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import ConsoleRenderable
    from rich.live import Live
    from rich.text import Text

    from lora_merge.core.report import Issue, Observer
    from lora_merge.merging.headline import Work

_LINE_SECONDS = 10.0  # between plain progress lines, where there is no terminal
_REFRESH = 8  # drawings of the bar per second
_LEAST_BAR, _MOST_BAR = 8, 40
_PHASE = 14
"""Columns for the name of a phase; a longer one takes more."""

_NUMBERS = 46
"""Columns that the numbers beside a bar take where there is room for all of them."""


@contextlib.contextmanager
def watching(*, quiet: bool, verbose: bool) -> Iterator[Observer]:
    """Yield an observer of a run."""
    # stdout is for results alone. What libraries print there goes where their warnings go.
    with contextlib.redirect_stdout(sys.stderr):
        if quiet:
            yield Silence()
        elif is_terminal():
            bar = _Bar(verbose=verbose)
            with live(bar.drawn) as shown:
                bar.live = shown
                yield bar
        else:
            yield _Lines(verbose=verbose)


def issue_lines(issue: Issue) -> list[str]:
    """Return an issue after its severity, then its hint."""
    return [f"{issue.severity}: {issue.line}", *([f"hint: {issue.hint}"] if issue.hint else [])]


def live(drawn: Callable[[], ConsoleRenderable]) -> Live:
    """Return a part of the terminal that is drawn again and again, and disappears at the end."""
    from rich.live import Live

    return Live(
        get_renderable=drawn,
        console=screen(stderr=True),
        refresh_per_second=_REFRESH,
        transient=True,
        # Otherwise rich would print the output of libraries as it is, control characters included.
        redirect_stdout=False,
        redirect_stderr=False,
    )


class _Bar:
    """An observer that draws one bar for the whole run; with ``verbose`` it prints the name of each tensor."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._meter = Meter(time.monotonic())
        self.live: Live | None = None

    def warn(self, issue: Issue) -> None:
        """Print a warning above the bar."""
        for line in issue_lines(issue):
            self._print(line)

    def begin(self, work: Work) -> None:
        """Print the headline above the bar, and size the bar."""
        self._print(work.headline)
        self._meter.begin(work.total_bytes, time.monotonic())

    def phase(self, name: str, total_bytes: int) -> None:
        self._meter.enter(fit(name), total_bytes, time.monotonic())

    def advance(self, nbytes: int) -> None:
        self._meter.add(nbytes, time.monotonic())

    def done(self, name: str) -> None:
        if self._verbose:
            self._print(f"  {name}")

    def drawn(self) -> Text:
        """Return the bar as it is now; empty before it is shown."""
        shown = self.live
        if shown is None:
            return drawn()
        return bar_text(self._meter, time.monotonic(), shown.console.width, glyphs(shown))

    def _print(self, text: str) -> None:
        if self.live is not None:
            say_on(self.live, text)


def glyphs(shown: Live) -> str:
    """Return the characters of a bar, done and left; those of ASCII where the terminal has no others."""
    return "━─" if shown.console.encoding.startswith("utf") else "=-"


def bar_text(meter: Meter, now: float, width: int, glyphs: str = "━─") -> Text:
    """Return the line of a progress bar. What does not fit is left out: first the rate, then the bytes, then the bar.

    Args:
        meter: what is done.
        now: seconds of its clock.
        width: of the terminal.
        glyphs: two characters, for what is done and for what is left.
    """
    share, room = meter.share(), width - 1
    phase = f"{shortened(meter.phase, max(_PHASE, room // 3)):<{_PHASE}}"
    parts = _numbers(meter, now)
    while parts and cells(phase) + _length(parts) + (2 + _LEAST_BAR) * (share is not None) > room:
        parts.remove(max(parts))
    found = drawn(shortened(phase, room))
    # A phase without numbers gets a bar of the same width, where the terminal is wide enough.
    beside = max(_length(parts), _NUMBERS if room > _PHASE + _NUMBERS + _LEAST_BAR else 0)
    free = room - cells(phase) - beside - 2
    if share is not None and free >= _LEAST_BAR:
        n_cells = min(free, _MOST_BAR)
        n_done = int(share * n_cells)
        found.append("  " + glyphs[0] * n_done)
        found.append(glyphs[1] * (n_cells - n_done), "dim")
    for _, text in parts:
        found.append(f"  {text}")
    return found


def _numbers(meter: Meter, now: float) -> list[tuple[int, str]]:
    """Return the numbers beside a bar, each with its rank: the largest goes first where there is no room."""
    share = meter.share()
    # A phase of unknown size follows the bytes, so all that can be said of it is its time.
    if share is None or not meter.is_sized:
        return [(0, clock_text(meter.phase_seconds(now)))]
    left, rate = meter.left(now), meter.rate(now)
    # All have a fixed width, so that the bar does not jump.
    return [
        (0, f"{share:4.0%}"),
        (2, _of(meter.done, meter.total)),
        (3, f"{f'{size_text(rate)}/s' if rate >= 1 else '':>10}"),
        (1, f"{f'{clock_text(left)} left' if left is not None else '':>9}"),
    ]


def _of(done: int, total: int) -> str:
    """Return " 1.90 of 3.00 GB": what is done in the unit of the whole.

    Example:
        >>> _of(950_000, 12_000_000), _of(12_000_000, 12_000_000)
        (' 0.9 of 12.0 MB', '12.0 of 12.0 MB')
    """
    number, _, unit = size_text(total).partition(" ")
    digits = len(number.partition(".")[2])
    shown = f"{done * float(number) / total:.{digits}f}"
    return f"{shown:>{len(number)}} of {number} {unit}"


def _length(parts: list[tuple[int, str]]) -> int:
    return sum(cells(text) + 2 for _, text in parts)


class _Lines:
    """An observer for logs: prints the headline, and a line when a phase begins, then one every `_LINE_SECONDS`."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._meter = Meter(time.monotonic())
        self._spoke = time.monotonic()

    def warn(self, issue: Issue) -> None:
        for line in issue_lines(issue):
            say(line)

    def begin(self, work: Work) -> None:
        say(work.headline)
        self._meter.begin(work.total_bytes, time.monotonic())

    def phase(self, name: str, total_bytes: int) -> None:
        self._spoke = time.monotonic()
        self._meter.enter(name, total_bytes, self._spoke)
        say(f"{name} …" if not total_bytes else f"{name} {size_text(total_bytes)} …")

    def advance(self, nbytes: int) -> None:
        now, meter = time.monotonic(), self._meter
        meter.add(nbytes, now)
        if now - self._spoke >= _LINE_SECONDS:
            self._spoke = now
            left = meter.left(now)
            parts = [_of(meter.done, meter.total).strip(), f"{size_text(meter.rate(now))}/s"]
            parts += [f"{clock_text(left)} left"] if left is not None else []
            say(f"{meter.phase}: {', '.join(parts)}")

    def done(self, name: str) -> None:
        if self._verbose:
            say_raw(f"  {name}")
