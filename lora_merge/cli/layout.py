"""Lays out text for a terminal: wraps at words, shortens paths in the middle, aligns columns. It prints nothing.

A width of None means that there is no limit: a pipe or a file gets each row on one line.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from lora_merge.redaction import fit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_TOKEN = re.compile(r"`[^`]*`\S*|(?:\{[0-9, -]*\}|\S)+")
"""A word. Text in backticks is a command or a name, and stays together; so do the names of several layers: ``layers.{0-3, 5}.mlp``."""

_JOINTS = (re.compile(r"(?<=[/,;:.=+])(?=[^/,;:.=+])"), re.compile(r"(?<=[_\-])(?=[^_\-])"))
"""Places inside a long word where it may go on in the next line. The second are within the parts of a name, and only used where
a part is longer than a line.
"""

_GAP = "  "
_LEAST_NAME = 12
_LEAST_TEXT = 24
"""Smallest widths of columns of names and of text."""

RED, YELLOW, BOLD, DIM = "31", "33", "1", "2"
"""Styles of a terminal (ECMA-48). Red is for errors, yellow for warnings, and nothing else has a colour."""


class Mark(NamedTuple):
    """Text with a style."""

    text: str
    style: str


Cell = str | Mark


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table."""

    head: str

    kind: Literal["name", "text", "number"] = "name"
    """Names are shortened in the middle where there is no room, texts are wrapped; numbers are aligned to the right."""

    can_go: bool = False
    """True where the column is left out if there is no room."""


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes.

    Example:
        >>> cells("abc"), cells("日本")
        (3, 4)
    """
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    none = sum(bool(unicodedata.combining(char)) for char in text)
    return len(text) + wide - none


def shortened(text: str, width: int | None) -> str:
    """Return a text that fits into a width: the middle is replaced by "…", of a path at its slashes.

    Example:
        >>> shortened("/home/user/models/llama/checkpoint-1200", 29)
        '/home/…/llama/checkpoint-1200'
        >>> shortened("model.layers.0.self_attn.q_proj", 20)
        'model.…f_attn.q_proj'
    """
    if width is None or cells(text) <= width:
        return text
    first, *parts = text.split("/") if "/" in text else (text,)
    if not first and parts:
        first = f"/{parts.pop(0)}"
    for n in range(len(parts) - 1, 0, -1):
        found = "/".join((first, "…", *parts[-n:]))
        if cells(found) <= width:
            return found
    # The end tells more than the beginning: names of tensors and of checkpoints differ there.
    head = max(1, (width - 1) // 3)
    tail = max(1, width - 1 - head)
    return f"{_cut(text, head)}…{_cut(text[::-1], tail)[::-1]}"


def _cut(text: str, width: int) -> str:
    """Return the longest beginning of a text that fits."""
    while cells(text) > width:
        text = text[: width - cells(text)]
    return text


def wrapped(text: str, width: int | None, hang: int = 2, *, break_words: bool = False) -> list[str]:
    """Return a text in lines that fit into a width, broken between words; those after the first are indented.

    A word that is longer than a line, such as the name of a tensor or a path, stays whole, so that it can be copied and searched
    for: it is the last word of its line, which is wider. Only one word may be before it, such as ``error:``.

    Args:
        text: one line.
        width: of the terminal.
        hang: number of spaces before each line but the first.
        break_words: break such words, except those in backticks, after a slash, a point or a comma. For places where a wider line
            would be cut off or move other columns.
    """
    if width is None or cells(text) <= width:
        return [text]
    indent = re.match(r" *", text)
    lines = [indent[0] if indent is not None else ""]
    n_words = 0  # of the last line
    for token in _TOKEN.findall(text):
        room = width - (hang if n_words else max(hang, len(lines[0])))
        for piece, glue in _pieces(token, room) if break_words else [(token, " ")]:
            joined = f"{lines[-1]}{glue if n_words else ''}{piece}"
            # It is wider than any line, so it may as well follow its label.
            is_wider = cells(piece) > room and n_words == 1 and cells(lines[-1]) <= width
            if cells(joined) <= width or not n_words or is_wider:
                lines[-1] = joined
                n_words += 1
            else:
                lines.append(f"{' ' * hang}{piece}")
                n_words = 1
    return lines


def _pieces(token: str, width: int) -> list[tuple[str, str]]:
    """Return the parts of a word, each with what is between it and the one before.

    Parts are broken after an underscore or a hyphen only where they are longer than a line.
    """
    if cells(token) <= width or token.startswith("`"):
        return [(token, " ")]
    outer, inner = _JOINTS
    first, *more = (
        part
        for whole in outer.split(token)
        for part in ([whole] if cells(whole) <= width else inner.split(whole))
    )
    return [(first, " "), *((part, "") for part in more)]


def facts(rows: Iterable[tuple[str, Cell]], width: int | None, indent: int = 2) -> list[str]:
    """Return labels with their values, the values aligned and wrapped.

    Args:
        rows: label and value; rows without a value are left out.
        width: of the terminal.
        indent: number of spaces before each label.
    """
    shown = [(fit(label), value) for label, value in rows if _text(value)]
    start = indent + max((cells(label) for label, _ in shown), default=0) + len(_GAP)
    lines = []
    for label, value in shown:
        body = wrapped(
            fit(_text(value)), None if width is None else max(_LEAST_TEXT, width - start), 0, break_words=True
        )
        lines.append(f"{' ' * indent}{_padded(label, start - indent)}{styled(body[0], value)}".rstrip())
        lines += (f"{' ' * start}{styled(line, value)}" for line in body[1:])
    return lines


def grid(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None, indent: int = 2
) -> list[str]:
    """Return a table: heads, then rows, columns aligned. No word of it is broken.

    Args:
        columns: from left to right.
        rows: as many cells as columns.
        width: of the terminal.
        indent: number of spaces before each line.
    """
    texts = [[fit(_text(cell)) for cell in row] for row in rows]
    natural = [
        max((cells(one.head), *(cells(row[n]) for row in texts)), default=0) for n, one in enumerate(columns)
    ]
    room = None if width is None else width - indent
    widths = _fitting(columns, natural, room)
    if widths is None:
        return _stacked(columns, rows, width, indent)
    shown = [n for n, size in enumerate(widths) if size]
    heads = [Mark(one.head, BOLD) if one.head else "" for one in columns]
    lines = _row(columns, heads, widths, shown, indent) if any(one.head for one in columns) else []
    for row in rows:
        lines += _row(columns, row, widths, shown, indent)
    return lines


def _fitting(columns: Sequence[Column], natural: list[int], room: int | None) -> list[int] | None:
    """Return the widths of columns, 0 for those that are left out; None where they cannot fit side by side."""
    widths = list(natural)
    if room is None:
        return widths

    def excess() -> int:
        shown = [size for size in widths if size]
        return sum(shown) + len(_GAP) * (len(shown) - 1) - room

    def squeeze(kind: str, least: int) -> None:
        for n in sorted(range(len(columns)), key=lambda n: -widths[n]):
            if columns[n].kind == kind and widths[n] > least and excess() > 0:
                widths[n] = max(least, cells(columns[n].head), widths[n] - excess())

    squeeze("text", _LEAST_TEXT)
    for n in reversed(range(len(columns))):
        if columns[n].can_go and excess() > 0:
            widths[n] = 0
            # What was squeezed for it gets its room back.
            widths = [size and natural[k] for k, size in enumerate(widths)]
            squeeze("text", _LEAST_TEXT)
    squeeze("name", _LEAST_NAME)
    return widths if excess() <= 0 else None


def _row(
    columns: Sequence[Column], row: Sequence[Cell], widths: list[int], shown: list[int], indent: int
) -> list[str]:
    """Return one row, as many lines as its tallest cell has."""
    bodies = {}
    for n in shown:
        text = fit(_text(row[n]))
        bodies[n] = (
            wrapped(text, widths[n], 0, break_words=True)
            if columns[n].kind == "text"
            else [shortened(text, widths[n])]
        )
    lines = []
    for k in range(max(map(len, bodies.values()), default=0)):
        parts = []
        for n in shown:
            text = bodies[n][k] if k < len(bodies[n]) else ""
            space = " " * max(0, widths[n] - cells(text))
            parts.append(
                f"{space}{styled(text, row[n])}"
                if columns[n].kind == "number"
                else f"{styled(text, row[n])}{space}"
            )
        lines.append(f"{' ' * indent}{_GAP.join(parts)}".rstrip())
    return lines


def _stacked(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int | None, indent: int
) -> list[str]:
    """Return a table for a narrow terminal: each row as labels and values."""
    lines = []
    for row in rows:
        named = [(one.head or "-", cell) for one, cell in zip(columns, row, strict=True)]
        lines += [*facts(named, width, indent), ""]
    return lines[:-1]


def _text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Mark) else cell


def _padded(text: str, width: int) -> str:
    return text + " " * max(0, width - cells(text))


def styled(text: str, cell: Cell) -> str:
    """Return a text in the style of a cell. `lora_merge.cli.voice` removes styles where they are not wanted."""
    return f"\x1b[{cell.style}m{text}\x1b[0m" if isinstance(cell, Mark) and text else text
