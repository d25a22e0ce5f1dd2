"""The way out: all that the command prints leaves through here.

Lines and tables take text as it is, names of strangers and all, and make it fit to be printed. Nothing is read as
markup, and nothing that is wrong with a terminal, a pipe or a log comes back as an error.
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
"""Columns that tables are drawn in, at least and at most, whatever the terminal says."""

_SIZES = ("COLUMNS", "LINES")
_SIZE = re.compile(r"[0-9]{1,5}")
"""A size of a terminal in the environment; rich fails on others."""

Cell = "str | tuple[str, ...] | Text"
"""What a table takes: a text, which becomes one line; several lines; a text of ours that has a style."""


def say(text: str) -> None:
    """Print one line for people, on stderr."""
    _write(sys.stderr, fit(text))


def say_lines(text: str) -> None:
    """Print lines for people, on stderr; the newlines are ours, and names in them were made fit to be printed."""
    for line in text.split("\n"):
        say(line)


def show(text: str) -> None:
    """Print lines that were asked for, on stdout; the newlines are ours, and names were made fit to be printed."""
    _write(sys.stdout, "\n".join(map(fit, text.split("\n"))))


def show_data(data: object) -> None:
    """Print a result for programs, on stdout."""
    _write(sys.stdout, as_json(data))


def as_json(data: object) -> str:
    """Return data as JSON without secrets and without any control character (JSON itself allows DEL).

    Example:
        >>> print(as_json("\\x1b\\x7f"))
        "\\u001b\\u007f"
    """
    return fit_json(json.dumps(data, indent=2))


def _write(stream: TextIO | None, text: str) -> None:
    """Write a line, as far as the stream takes it: a program that calls us may have one that does not."""
    if stream is None:
        return
    to = own(stream)
    encoding = to.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        to.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        to.flush()


def is_terminal() -> bool:
    """Return True where a progress bar can be drawn on stderr."""
    return (
        sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}
    )


def screen(*, stderr: bool = False) -> RichConsole:
    """Return a console for tables and bars that takes text as it is: no markup, no emoji, no highlighting, no links."""
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
    """Return a text as it is printed, in one line; long words are folded, not cut."""
    from rich.text import Text

    return Text(fit(text), style, overflow="fold")


def table(*columns: str, title: str, rows: Iterable[tuple[Any, ...]] = (), head: bool = True) -> Table:
    """Return a table of cells that are texts of anybody's.

    Args:
        columns: their heads.
        title: may be a name.
        rows: `Cell`s.
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
    """Write something under a table."""
    of.caption = styled(text, "table.caption")
