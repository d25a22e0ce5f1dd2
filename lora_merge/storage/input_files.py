"""The input files of a run: which files they were when they were opened, and what was read of them.

`storage.sources` tells of every file that it opens, `storage.reading` of every byte that it reads. Inside `watching`, the first opening of a path
says which file the run means; a later one that finds another file, or other bytes, raises `ChangedError` at once. What was
seen comes back as a frozen `Inputs`, which can be compared with the disk at the end (`check`).
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import TYPE_CHECKING

from lora_merge.core.identity import Inputs, Place
from lora_merge.errors import ChangedError
from lora_merge.storage.page_cache import look_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.identity import InputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.sources import Source

_HINT = "run again when nothing else writes to it"


class Watch:
    """Takes note of what is opened and read. It may be told by several threads.

    Args:
        inputs: what is known already.
        outer: hears of everything as well.
        is_closed: files that are not among them are none of its business: a run reads its own output, too.
        is_noting: what is read of them is noted as well.
    """

    def __init__(
        self, inputs: Inputs, outer: Watch | None = None, *, is_closed: bool, is_noting: bool = True
    ) -> None:
        self._files, self._readings = dict(inputs.files), dict(inputs.readings)
        self._outer, self._is_closed, self.is_noting = outer, is_closed, is_noting

    def opened(self, source: Source) -> None:
        """Take note of a file that was opened for reading.

        Raises:
            ChangedError: it is not the file that it was.
        """
        known = self._files.get(source.text)
        if known is None and not self._is_closed:
            self._files[source.text] = look_at(source)
        elif known is not None and not known.may_be(source.version):
            raise changed(source.text)
        if self._outer is not None:
            self._outer.opened(source)

    def read(self, place: Place, digest: str) -> None:
        """Take note of some bytes that were read.

        Raises:
            ChangedError: other bytes were found there before.
        """
        if place.file in self._files and self._readings.setdefault(place, digest) != digest:
            raise changed(place.file)
        if self._outer is not None:
            self._outer.read(place, digest)

    def inputs(self) -> Inputs:
        """Return what was seen so far."""
        return Inputs(dict(self._files), dict(self._readings))

    def taken(self) -> dict[Place, str]:
        """Return what was read since this was called last."""
        readings = dict(self._readings)
        self._readings.clear()
        return readings


_WATCH: ContextVar[Watch | None] = ContextVar("input_files", default=None)


@contextlib.contextmanager
def watching(*known: Inputs, is_noting: bool = True) -> Iterator[Watch]:
    """Watch what is read inside the block, and hold it to what is known.

    Args:
        known: what was seen before: only its files are watched then. Without, every file that is opened.
        is_noting: False where what is read has digests anyway.

    Raises:
        ChangedError: two of those that are known do not agree.
    """
    watch = Watch(_joined(known), _WATCH.get(), is_closed=bool(known), is_noting=is_noting)
    token = _WATCH.set(watch)
    try:
        yield watch
    finally:
        _WATCH.reset(token)


@contextlib.contextmanager
def told(watch: Watch) -> Iterator[None]:
    """Have a watch take note of what this thread reads in the block."""
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def _joined(several: tuple[Inputs, ...]) -> Inputs:
    """Return what several runs know, as one; their readings are theirs.

    Raises:
        ChangedError: they do not agree on a file.
    """
    if len(several) == 1:
        return several[0]
    files: dict[str, InputFile] = {}
    for inputs in several:
        for path, file in inputs.files.items():
            if not files.setdefault(path, file).may_be(file.identity):
                raise changed(path)
    return Inputs(files)


def tell_opened(source: Source) -> None:
    """Tell whoever watches that a file was opened.

    Raises:
        ChangedError: it is not the file that it was.
    """
    watch = _WATCH.get()
    if watch is not None:
        watch.opened(source)


def tell_read(text: str, start: int, content: memoryview | bytes) -> None:
    """Tell whoever watches that some bytes were read.

    Raises:
        ChangedError: other bytes were found there before.
    """
    watch = _WATCH.get()
    if watch is not None and watch.is_noting:
        import xxhash

        digest = f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"
        watch.read(Place(text, start, len(content)), digest)


def tell_digest(ref: TensorRef, digest: str) -> None:
    """Tell whoever watches that a whole tensor was read, and had this digest.

    Raises:
        ChangedError: other bytes were found there before.
    """
    watch = _WATCH.get()
    if watch is not None:
        watch.read(Place(ref.file, ref.start, ref.nbytes), digest)


def changed(path: str, what: str = "changed while it was read") -> ChangedError:
    """Return the error of an input that is not what it was."""
    return ChangedError(path, "", what, hint=_HINT)
