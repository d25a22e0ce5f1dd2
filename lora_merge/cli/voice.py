"""Prints everything that the command says, and makes it fit to be printed.

Lines and tables take any text, including names from files of strangers. Control characters are shown as text, and
nothing is read as markup. A stream that fails (a closed pipe, a full disk) never raises an error here.

On a terminal, lines are wrapped between words. Commands, names and paths to copy are never broken by us: those that are
longer than a line are for the terminal to wrap.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from typing import TYPE_CHECKING, TextIO

from lora_merge.cli.layout import RED, YELLOW, Mark, styled, wrapped
from lora_merge.redaction import fit, fit_json
from lora_merge.runtime.streams import own

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console as RichConsole
    from rich.live import Live
    from rich.text import Text

_WIDTHS = (20, 500)
"""Smallest and largest width of tables in columns, whatever the terminal reports."""

_SIZES = ("COLUMNS", "LINES")
_SIZE = re.compile(r"[0-9]{1,5}")
"""A valid size of a terminal in the environment. rich fails on others."""

_STYLE = re.compile(r"\x1b\[[0-9;]*m")

_START = re.compile(r" *(?:\d+\. |- |hint: (?<= hint: ))?")
"""What a line begins with: its other lines are indented as far."""

_SEVERITIES = {"error": RED, "warning": YELLOW, "failed": RED}
"""First word of a line → its colour. Other lines have none."""


def say(text: str) -> None:
    """Print one line on stderr, wrapped between words. Newlines and control characters in it are shown as text.

    The word before the first colon is coloured where it is ``error`` or ``warning``. Paths below the current directory are
    shown as seen from it.
    """
    # Only a terminal needs lines that are wrapped. In a log, a message is one line.
    is_shown = sys.stderr is not None and sys.stderr.isatty()
    start = _START.match(text)
    hang = len(start[0]) if start is not None and start[0] else 2
    lines = wrapped(fit(_near(text)), width_of(sys.stderr) if is_shown else None, hang)
    first, colon, rest = lines[0].partition(":")
    if colon and first in _SEVERITIES:
        lines[0] = f"{styled(f'{first}:', Mark('', _SEVERITIES[first]))}{rest}"
    _print(sys.stderr, lines)


def _near(text: str) -> str:
    """Return a text with its paths below the current directory relative to it."""
    try:
        here = os.getcwd()  # noqa: PTH109 - compared as text
    except OSError:
        return text
    # After file: the path is a part of a URL.
    return (
        re.sub(rf"(?<![^\s'\"(=:,])(?<!file:){re.escape(here)}/(?=[^\s/])", "", text)
        if len(here) > 1
        else text
    )


def say_lines(text: str) -> None:
    """Print several lines on stderr; each newline counts, so names in them have to be fit before."""
    for line in text.split("\n"):
        say(line)


def say_raw(text: str) -> None:
    """Print one line on stderr that is not wrapped: a command to copy, a line of a traceback."""
    _print(sys.stderr, [fit(text)])


def say_on(shown: Live, text: str) -> None:
    """Print a line above what is drawn again and again, wrapped between words."""
    for line in wrapped(fit(text), shown.console.width, break_words=True):
        shown.console.print(drawn(line))


def drawn(text: str = "") -> Text:
    """Return one line for rich to draw; what does not fit its terminal is cut off."""
    from rich.text import Text

    return Text(fit(text), no_wrap=True, overflow="crop")


def say_layout(lines: Iterable[str]) -> None:
    """Print lines of `lora_merge.cli.layout` on stderr. Their texts are fit already, and have styles."""
    _print(sys.stderr, lines)


def show(text: str) -> None:
    """Print requested lines on stdout. Names in them have to be made fit before, since each newline counts."""
    _print(
        sys.stdout, [part for line in text.split("\n") for part in wrapped(fit(line), width_of(sys.stdout))]
    )


def show_raw(text: str) -> None:
    """Print one requested line on stdout that is not wrapped: a command to copy."""
    _print(sys.stdout, [fit(text)])


def show_layout(lines: Iterable[str]) -> None:
    """Print lines of `lora_merge.cli.layout` on stdout."""
    _print(sys.stdout, lines)


def width_of(stream: TextIO | None) -> int | None:
    """Return the columns of the terminal behind a stream; None where it is not a terminal and COLUMNS is not set."""
    low, high = _WIDTHS
    given = os.environ.get("COLUMNS", "")
    if _SIZE.fullmatch(given) and int(given):
        return min(max(int(given), low), high)
    if stream is None or not stream.isatty():
        return None
    columns = 0
    with contextlib.suppress(OSError, ValueError):
        columns = os.get_terminal_size(stream.fileno()).columns
    # A terminal of serial lines may report 0.
    return min(max(columns or 80, low), high)


def has_colours(stream: TextIO | None) -> bool:
    """Return True where styles may be printed: on a terminal, unless NO_COLOR is set (no-color.org)."""
    if os.environ.get("NO_COLOR") or stream is None:
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}


def _print(stream: TextIO | None, lines: Iterable[str]) -> None:
    """Print lines that are fit, without their styles where the stream does not take them."""
    text = "\n".join(lines)
    _write(stream, text if has_colours(stream) else _STYLE.sub("", text))


def show_data(data: object) -> None:
    """Print a result as JSON on stdout."""
    _write(sys.stdout, as_json(data))


def as_json(data: object) -> str:
    """Return data as JSON without secrets and without any control character (JSON itself allows DEL).

    Example:
        >>> print(as_json("\\x1b\\x7f"))
        "\\u001b\\u007f"
    """
    return fit_json(json.dumps(data, indent=2))


def _write(stream: TextIO | None, text: str) -> None:
    """Write a line to a stream; errors are ignored, and so is a missing stream."""
    if stream is None:
        return
    to = own(stream)
    encoding = to.encoding or "utf-8"
    # A program that calls us may have a stream that fails. `runtime.streams` keeps the failure for the end.
    with contextlib.suppress(OSError, ValueError):
        # Characters that the stream's encoding lacks are written as escapes.
        to.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        to.flush()


def is_terminal() -> bool:
    """Return True if stderr is a terminal on which a progress bar can be drawn."""
    return (
        sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}
    )


def screen(*, stderr: bool = False) -> RichConsole:
    """Return a rich console that prints text unchanged: no markup, emoji, highlighting or links."""
    from rich.console import Console as RichConsole

    environ = {
        name: value for name, value in os.environ.items() if name not in _SIZES or _SIZE.fullmatch(value)
    }
    made = RichConsole(
        file=own(sys.stderr if stderr else sys.stdout),
        markup=False,
        emoji=False,
        highlight=False,
        _environ=environ,
    )
    low, high = _WIDTHS
    if not low <= made.width <= high:
        made.width = min(max(made.width, low), high)
    return made
