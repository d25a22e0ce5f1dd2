"""Prints everything that the command says, and makes it fit to be printed.

Lines and tables take any text, including names from files of strangers. Control characters are shown as text, and
nothing is read as markup. A stream that fails (a closed pipe, a full disk) never raises an error here.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

from lora_merge.redaction import fit, fit_json
from lora_merge.runtime.streams import own

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

_WIDTHS = (20, 500)
"""Smallest and largest width of tables in columns, whatever the terminal reports."""

_SIZES = ("COLUMNS", "LINES")
_SIZE = re.compile(r"[0-9]{1,5}")
"""A valid size of a terminal in the environment. rich fails on others."""

Cell = "str | tuple[str, ...] | Text"
"""A cell of a table: a text (one line), several lines, or a text with a style."""


def say(text: str) -> None:
    """Print one line on stderr. Newlines and control characters in it are shown as text."""
    _write(sys.stderr, fit(text))


def say_lines(text: str) -> None:
    """Print several lines on stderr; each newline counts, so names in them have to be fit before."""
    for line in text.split("\n"):
        say(line)


def show(text: str) -> None:
    """Print requested lines on stdout. Names in them have to be made fit before, since each newline counts."""
    _write(sys.stdout, "\n".join(map(fit, text.split("\n"))))


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


def styled(text: str, style: str = "") -> Text:
    """Return a text in one line, fit to be printed. Long words are folded, not cut."""
    from rich.text import Text

    return Text(fit(text), style, overflow="fold")


def table(*columns: str, title: str, rows: Iterable[tuple[Any, ...]] = (), head: bool = True) -> Table:
    """Return a table whose cells may hold any text.

    Args:
        columns: heads of the columns.
        title: any text.
        rows: `Cell`s, as many in each row as there are columns.
        head: show the heads.
    """
    from rich.table import Table

    made = Table(*columns, title=styled(title, "table.title"), show_header=head)
    for row in rows:
        add_row(made, *row)
    return made


def add_row(to: Table, *cells: Any, style: str = "") -> None:
    """Add a row of `Cell`s to a table."""
    to.add_row(*map(_cell, cells), style=style)


def _cell(cell: Any) -> Text:
    from rich.text import Text

    match cell:
        case Text():
            return cell
        case tuple():
            return Text("\n".join(map(fit, cell)), overflow="fold")
        case text:
            return styled(str(text))


def caption(of: Table, text: str) -> None:
    """Set the line under a table."""
    of.caption = styled(text, "table.caption")
