"""Runs a command in a pseudo-terminal, and emulates what a user would see."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import struct
import termios
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pyte

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class Glyph(NamedTuple):
    """One cell of a screen."""

    text: str
    colour: str
    """A name of pyte: ``"default"``, ``"red"``, ``"brown"`` (yellow) …"""

    bold: bool


@dataclass(frozen=True)
class Screen:
    """A screen as it is at one moment."""

    rows: tuple[tuple[Glyph, ...], ...]

    @property
    def lines(self) -> list[str]:
        """The text of each row, without the space at its end."""
        return ["".join(glyph.text for glyph in row).rstrip() for row in self.rows]

    @property
    def text(self) -> str:
        """All rows."""
        return "\n".join(self.lines).rstrip()


@dataclass(frozen=True)
class Session:
    """What a command showed."""

    frames: tuple[Screen, ...]
    """The screen after each portion of output; the last one is what stays."""

    status: int
    n_scrolled: int
    """Rows that left the screen at the top."""


def record(
    words: Sequence[str],
    *,
    columns: int,
    rows: int,
    cwd: Path | None = None,
    typed: str = "",
    environ: Mapping[str, str] | None = None,
) -> Session:
    """Run a command on a terminal and return what it showed.

    Args:
        words: the program and its arguments.
        columns: of the terminal.
        rows: of the terminal.
        cwd: where it runs.
        typed: what stands on the screen before it, as a user would have typed it.
        environ: variables to add.
    """
    screen = pyte.HistoryScreen(columns, rows, history=10_000)
    stream = pyte.ByteStream(screen)
    if typed:
        stream.feed(f"$ {typed}\r\n".encode())
    frames: list[Screen] = []
    status = -1
    for piece in _output(words, columns, rows, cwd, environ or {}):
        if isinstance(piece, int):
            status = piece
        else:
            stream.feed(piece)
            frames.append(_taken(screen))
    return Session(tuple(frames) or (_taken(screen),), status, len(screen.history.top))


def _output(
    words: Sequence[str], columns: int, rows: int, cwd: Path | None, environ: Mapping[str, str]
) -> Iterator[bytes | int]:
    """Yield what a command writes, piece by piece, then its exit status."""
    pid, terminal = pty.fork()
    if pid == 0:
        # The size has to be right before the program looks at it.
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if cwd is not None:
            os.chdir(cwd)
        kept = {
            name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}
        }
        os.execve(words[0], list(words), {**kept, "TERM": "xterm-256color", **environ})
    try:
        # EIO: the program has closed its end.
        with contextlib.suppress(OSError):
            while piece := os.read(terminal, 1 << 16):
                yield piece
        yield os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    finally:
        os.close(terminal)


def _taken(screen: pyte.Screen) -> Screen:
    rows = []
    for y in range(screen.lines):
        line = screen.buffer[y]
        rows.append(tuple(Glyph(line[x].data, line[x].fg, line[x].bold) for x in range(screen.columns)))
    return Screen(tuple(rows))
