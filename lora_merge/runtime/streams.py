"""The standard streams of lora-merge's own processes: always open, never raising, one readable line at a time.

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
"""The first descriptor after those of the standard streams."""

_LONGEST_LINE = 4096
"""Characters of an unfinished line that are kept before it is printed as it is."""


def guard() -> None:
    """Make the standard streams of this process safe. Call it before any other file is opened.

    A closed stream is opened on the null device: otherwise a file of the output would get its number, and log lines
    with it. ``sys.stdout`` and ``sys.stderr`` never raise again: what cannot be written is dropped, and `failure_of`
    says why. What libraries and Python itself print on ``sys.stderr`` becomes notes, one line each (`Foreign`); what
    is printed on purpose goes to `own`.
    """
    # In order, since `_open_missing` takes the lowest free number.
    for fd in range(_FIRST_OTHER):
        _open_missing(fd)
    warnings.formatwarning = _warning_text
    sys.stdout = _text(1, sys.stdout)
    sys.stderr = Foreign(_text(2, sys.stderr))


def _warning_text(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning without its source line, which tells a user nothing."""
    del filename, lineno, line
    return f"{category.__name__}: {message}\n"


def _open_missing(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free


def _text(fd: int, before: TextIO | None) -> TextIO:
    """Return a text stream on a standard descriptor, in the encoding that Python chose for it."""
    encoding = (before.encoding if before is not None else "") or "utf-8"
    return io.TextIOWrapper(
        cast("BinaryIO", _Sink(fd)),
        encoding=encoding,
        errors="backslashreplace",
        newline="\n",
        write_through=True,
    )


class _Sink(io.RawIOBase):
    """A standard descriptor that takes bytes as long as anybody reads them.

    A pipe whose reader has gone, a full disk and a terminal that hung up end the writing, not the work. It holds a
    duplicate of the descriptor, so that number 2 may lead elsewhere for a while.
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
        """Write all bytes; after an error they are dropped, and `failure` has the first error."""
        left = memoryview(data).cast("B")
        nbytes = len(left)
        # After the first error the rest of the process's output is dropped, so later writes cost nothing.
        while len(left) and self.failure is None:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:  # a terminal that another program left in that mode
                select.select([], [self._fd], [])
            except OSError as exc:
                self.failure = exc
        return nbytes


class Foreign(io.TextIOBase):
    """Turns what libraries print on ``sys.stderr`` (log records and Python's warnings too) into notes, one line each.

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
        """The encoding of the stream behind it."""
        return self.own.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """How the stream behind it handles characters that its encoding lacks."""
        return self.own.errors

    @property
    def buffer(self) -> io.RawIOBase:
        """A binary stream: bytes that are written to it are foreign text too."""
        return _Bytes(self)

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Return True when the stream behind it is a terminal."""
        return self.own.isatty()

    def fileno(self) -> int:
        """Return the descriptor of the stream behind it."""
        return self.own.fileno()

    def write(self, text: str, /) -> int:
        """Print the lines that are complete; keep the rest for later."""
        with self._lock:
            *whole, self._line = (self._line + text).replace("\r\n", "\n").split("\n")
            if len(self._line) > _LONGEST_LINE:
                whole.append(self._line)
                self._line = ""
            for line in whole:
                self._print(line)
        return len(text)

    def finish(self) -> None:
        """Print the kept rest of a line, at the end of the process."""
        with self._lock:
            line, self._line = self._line, ""
            self._print(line)

    def _print(self, line: str) -> None:
        # A progress bar redraws its line with \r: only its last state is printed.
        line = line.rstrip("\r").rpartition("\r")[2].rstrip()
        if line and not self.quiet:
            start = "\r\x1b[K" if self.isatty() else ""  # a progress bar may be drawn there
            self.own.write(f"{start}note: {fit(line)}\n")


class _Bytes(io.RawIOBase):
    """The binary side of `Foreign`."""

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
    """Return the stream to print our own lines on, behind the one that turns foreign text into notes."""
    return getattr(stream, "own", stream)


def finish() -> None:
    """Print the rest of a foreign line that has no end yet."""
    if isinstance(sys.stderr, Foreign):
        sys.stderr.finish()


def failure_of(stream: TextIO) -> OSError | None:
    """Return the error after which a stream drops everything; None while it works, or when its reader left."""
    failure: OSError | None = getattr(getattr(own(stream), "buffer", None), "failure", None)
    # EPIPE is not a fault: `| head` has seen enough.
    return None if failure is None or failure.errno == errno.EPIPE else failure


@contextlib.contextmanager
def native_notes() -> Iterator[None]:
    """Turn what native code prints on descriptor 2 in the block into notes: a panic of a Rust library, for one.

    Only where `guard` was called: elsewhere the descriptor is not ours, and the block runs as it is.
    """
    if not isinstance(sys.stderr, Foreign):
        yield
        return
    import tempfile

    # A file, not a pipe: it never fills up, and no thread has to read it.
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
