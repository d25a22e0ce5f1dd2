"""The standard streams of a process that is lora-merge's own: always open, never in the way of the work, fit to be read.

For the command and the processes that it starts. A program that uses lora-merge as a library keeps the streams it has.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import select
import sys
import threading
import warnings
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

from lora_merge.redaction import fit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer

_FIRST_OTHER = 3
"""The first descriptor that is no standard stream."""

_LONGEST_LINE = 4096
"""Characters of an unfinished line that are kept before it is printed as it is."""


def guard() -> None:
    """Make the standard streams of this process safe; to be called before any other file is opened.

    A closed one is opened on the null device, so that no file of an output gets its number, and its log lines with it.
    ``sys.stdout`` and ``sys.stderr`` never raise again: what cannot be written is dropped, and `failure_of` says why.
    What libraries and Python itself print on ``sys.stderr`` becomes notes, a line each (`Foreign`); what is printed
    deliberately goes to `own`.
    """
    for fd in range(_FIRST_OTHER):
        _open_missing(fd)
    warnings.formatwarning = _warning_text
    sys.stdout = _text(1, sys.stdout)
    sys.stderr = Foreign(_text(2, sys.stderr))


def _warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning of Python without the line of the program that gave it, which is nobody's here."""
    del filename, lineno, line
    return f"{category.__name__}: {message}\n"


def _open_missing(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free


def _text(fd: int, before: TextIO | None) -> TextIO:
    """Return a text stream over a standard descriptor, in the encoding that Python chose for it."""
    encoding = (before.encoding if before is not None else "") or "utf-8"
    return io.TextIOWrapper(
        cast("BinaryIO", _Sink(fd)),
        encoding=encoding,
        errors="backslashreplace",
        newline="\n",
        write_through=True,
    )


class _Sink(io.RawIOBase):
    """A standard descriptor that bytes can be written to, as long as somebody takes them.

    A pipe whose reader has gone, a full disk and a terminal that hung up end the writing, not the work. It holds a
    descriptor of its own, so that number 2 may lead elsewhere for a while.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.failure: OSError | None = None
        self._name = fd
        self._fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_OTHER)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._name

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it, or drop it."""
        left = memoryview(data).cast("B")
        nbytes = len(left)
        while len(left) and self.failure is None:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # a terminal that another program left in that mode
                select.select([], [self._fd], [])
            except OSError as exc:
                self.failure = exc
        return nbytes


class Foreign(io.TextIOBase):
    """What libraries print on ``sys.stderr``, log records and warnings of Python among it: notes, a line each.

    A stranger's text may be in it, so each line is made fit to be printed and begins as one of ours: none can look like
    an error of lora-merge, or end what it says. Of a line that is drawn again and again (a progress bar) the last
    state is printed.
    """

    def __init__(self, own: TextIO) -> None:
        super().__init__()
        self.own = own
        self.quiet = False
        """Drop it all."""

        self._line = ""
        self._lock = threading.RLock()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of what is behind it."""
        return self.own.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """How what does not fit the encoding is written."""
        return self.own.errors

    @property
    def buffer(self) -> io.RawIOBase:
        """Bytes that are written here are foreign text too."""
        return _Bytes(self)

    def writable(self) -> bool:
        """Return True."""
        return True

    def isatty(self) -> bool:
        """Return True on a terminal."""
        return self.own.isatty()

    def fileno(self) -> int:
        """Return the descriptor behind it."""
        return self.own.fileno()

    def write(self, text: str, /) -> int:
        """Print the lines that are complete."""
        with self._lock:
            *whole, self._line = (self._line + text).replace("\r\n", "\n").split("\n")
            if len(self._line) > _LONGEST_LINE:
                whole.append(self._line)
                self._line = ""
            for line in whole:
                self._print(line)
        return len(text)

    def finish(self) -> None:
        """Print what is left of a line without an end."""
        with self._lock:
            line, self._line = self._line, ""
            self._print(line)

    def _print(self, line: str) -> None:
        line = line.rstrip("\r").rpartition("\r")[2].rstrip()
        if line and not self.quiet:
            start = "\r\x1b[K" if self.isatty() else ""  # a progress bar may be drawn there
            self.own.write(f"{start}note: {fit(line)}\n")


class _Bytes(io.RawIOBase):
    """The bytes behind foreign text."""

    def __init__(self, text: Foreign) -> None:
        super().__init__()
        self._text = text

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        found = bytes(data)
        self._text.write(found.decode("utf-8", "backslashreplace"))
        return len(found)


def own(stream: TextIO) -> TextIO:
    """Return where to print what is meant for ``sys.stdout`` or ``sys.stderr``, past what keeps foreign text apart."""
    return getattr(stream, "own", stream)


def finish() -> None:
    """Print what is left of a line that foreign text began."""
    if isinstance(sys.stderr, Foreign):
        sys.stderr.finish()


def failure_of(stream: TextIO) -> OSError | None:
    """Return why a stream of this process takes nothing any more; None where it does, or where its reader has left."""
    failure: OSError | None = getattr(getattr(own(stream), "buffer", None), "failure", None)
    return None if failure is None or failure.errno == errno.EPIPE else failure


@contextlib.contextmanager
def native_notes() -> Iterator[None]:
    """Make notes of what native code prints on descriptor 2 in the block: a panic of a library in Rust, for one.

    Only where `guard` was called: elsewhere the descriptor is not ours, and the block runs as it is.
    """
    if not isinstance(sys.stderr, Foreign):
        yield
        return
    import tempfile

    with tempfile.TemporaryFile() as file:
        before = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, _FIRST_OTHER)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            sys.stderr.write(file.read().decode("utf-8", "backslashreplace"))
            sys.stderr.finish()
