"""Sources: a text names a file, and a `Source` is one version of its bytes, wherever they are.

`SCHEMES` is the table of storages. Another one is a module beside this and a line there.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

from lora_merge.storage import input_files
from lora_merge.storage.hub.hub_files import HUB_FILES
from lora_merge.storage.local import LOCAL
from lora_merge.storage.local_copies import WithCopies
from lora_merge.storage.objects.scheme import OBJECTS
from lora_merge.storage.objects.urls import SHAPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    from lora_merge.core.identity import FileIdentity


class Source(Protocol):
    """The bytes of one version of a file, open for positioned reads. Several threads may read at once."""

    @property
    def text(self) -> str:
        """The name that it was opened by, for messages and for the notes of `input_files.watching`."""

    @property
    def nbytes(self) -> int:
        """Its size when it was opened. A local file may grow or shrink afterwards."""

    @property
    def version(self) -> FileIdentity:
        """The identity of these bytes. Other bytes under the same name have another one."""

    @property
    def fd(self) -> int | None:
        """A descriptor, for calls that let the kernel move the bytes; None where there is no file of this machine."""

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read into a buffer from an offset in bytes; return the number of bytes, which may be fewer than fit, and is
        0 at the end.

        Raises:
            OSError: they cannot be read.
            CheckpointError: the same, where the storage has more to say.
            ChangedError: there are other bytes under this name now.
        """

    def ahead(self, start: int, nbytes: int) -> None:
        """Announce that a range will be read next, so that it can be fetched meanwhile. It never fails."""


class Scheme(Protocol):
    """A storage that sources are in: it opens files and knows their versions."""

    def open(self, text: str) -> AbstractContextManager[Source]:
        """Open a file for the length of a block.

        Raises:
            CheckpointError: it is missing, cannot be opened, or is not a regular file.
        """

    def version_at(self, text: str) -> FileIdentity:
        """Return which version has a name now.

        Raises:
            OSError: it does not exist, or cannot be looked at.
            CheckpointError: it cannot be looked at, where the storage has more to say.
        """


SCHEMES: Mapping[str, Scheme] = {
    "": LOCAL,
    **dict.fromkeys(SHAPES, WithCopies(OBJECTS)),
    "hf": WithCopies(HUB_FILES),
}
"""Scheme (the text before ``://``) → storage; every other text is the path of a file of this machine."""


def scheme_of(text: str) -> Scheme:
    """Return the storage of a text: that of its ``scheme://``, else this machine's files."""
    name, mark, _ = text.partition("://")
    return SCHEMES.get(name if mark else "", SCHEMES[""])


def is_local(text: str) -> bool:
    """Return True for the path of a file of this machine."""
    return scheme_of(text) is LOCAL


def is_stored(text: str) -> bool:
    """Return True when a file has this name, and may be looked at."""
    try:
        version_at(text)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def open_source(text: str | Path) -> Iterator[Source]:
    """Open a file for reading. Every file of a stranger is opened here.

    Raises:
        CheckpointError: the file is missing, cannot be opened, or is not a regular file.
        ChangedError: the run has read another file of this name (`input_files.watching`).
    """
    kept = _KEPT.get()
    # A file of this machine is opened again: that takes no request.
    if kept is not None and not is_local(str(text)):
        yield kept.source(str(text))
        return
    with open_unwatched(text) as source:
        input_files.tell_opened(source)
        yield source


class _Kept:
    """Sources that stay open, by the text that names them. It belongs to one thread."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._open: dict[str, Source] = {}

    def source(self, text: str) -> Source:
        if text not in self._open:
            self._open[text] = self._stack.enter_context(open_unwatched(text))
            input_files.tell_opened(self._open[text])
        return self._open[text]


_KEPT: ContextVar[_Kept | None] = ContextVar("kept_open", default=None)


@contextlib.contextmanager
def kept_open() -> Iterator[None]:
    """Open files of other storages once: what this thread opens inside the block stays open until its end.

    To open one takes a request there, and a worker opens the same file for each of its tensors.
    """
    with contextlib.ExitStack() as stack:
        token = _KEPT.set(_Kept(stack))
        try:
            yield
        finally:
            _KEPT.reset(token)


def open_unwatched(text: str | Path) -> AbstractContextManager[Source]:
    """Open a file that is only looked at, to say what it is.

    Raises:
        CheckpointError: the file is missing, cannot be opened, or is not a regular file.
    """
    name = str(text)
    return scheme_of(name).open(name)


def version_at(text: str) -> FileIdentity:
    """Return which version of a file has a name now.

    Raises:
        OSError: it does not exist, or cannot be looked at.
    """
    return scheme_of(text).version_at(text)


def identity_at(text: str) -> FileIdentity:
    """Return the version that an input's name means now.

    Raises:
        ChangedError: none has it any more.
    """
    try:
        return version_at(text)
    except OSError as exc:
        raise input_files.changed(text, "disappeared while it was read") from exc
