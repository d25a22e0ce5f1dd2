"""The input files of a run: which version of each was opened, and what was read of it.

`storage.sources` reports every file that it opens, `storage.reading` every byte that it reads. Inside `watching`, the
first opening of a path decides which file the run means; a later one that finds another file, or other bytes, raises
`ChangedError` at once. The result is a frozen `Inputs`, which is compared with the disk at the end
(`merging.unchanged_inputs`).
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

    from lora_merge.core.identity import FileIdentity, InputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.storage.sources import Source

_HINT = "run again while no other program writes to it"


class Watch:
    """Notes what is opened and read. Several threads may report to it.

    Args:
        inputs: what is known already.
        outer: another watch that gets every report too.
        is_closed: ignore files that are not among ``inputs``: a run reads its own output, too.
        is_noting: also note what is read, not only which files.
    """

    def __init__(
        self, inputs: Inputs, outer: Watch | None = None, *, is_closed: bool, is_noting: bool = True
    ) -> None:
        self._files, self._readings = dict(inputs.files), dict(inputs.readings)
        self._outer, self._is_closed, self.is_noting = outer, is_closed, is_noting

    def opened(self, source: Source) -> None:
        """Note a file that was opened for reading.

        Raises:
            ChangedError: another file had this name before.
        """
        known = self._files.get(source.text)
        # The first opening decides which file the run means.
        if known is None and not self._is_closed:
            self._files[source.text] = look_at(source)
        elif known is not None and not known.may_be(source.version):
            raise changed(source.text)
        if self._outer is not None:
            self._outer.opened(source)

    def read(self, place: Place, digest: str) -> None:
        """Note the digest of some bytes that were read.

        Raises:
            ChangedError: other bytes were read there before.
        """
        # Two readings of one place must agree, whatever the times say.
        if place.file in self._files and self._readings.setdefault(place, digest) != digest:
            raise changed(place.file)
        if self._outer is not None:
            self._outer.read(place, digest)

    def known(self, text: str) -> FileIdentity | None:
        """Return the version that the run means by a name; None where nothing of that name was opened."""
        file = self._files.get(text)
        if file is not None:
            return file.identity
        return self._outer.known(text) if self._outer is not None else None

    def inputs(self) -> Inputs:
        """Return the files and readings noted so far, as frozen data."""
        return Inputs(dict(self._files), dict(self._readings))

    def taken(self) -> dict[Place, str]:
        """Return the readings since the last call of this, and forget them."""
        readings = dict(self._readings)
        self._readings.clear()
        return readings


# A context variable: passing a watch through every reader of every format would leave a hole where one
# forgets it.
_WATCH: ContextVar[Watch | None] = ContextVar("input_files", default=None)


@contextlib.contextmanager
def watching(*known: Inputs, is_noting: bool = True) -> Iterator[Watch]:
    """Note what is read inside the block, and compare it with what is known.

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
    """Report what this thread reads in the block to a watch. Context variables do not reach a pool's threads by
    themselves.
    """
    token = _WATCH.set(watch)
    try:
        yield
    finally:
        _WATCH.reset(token)


def _joined(several: tuple[Inputs, ...]) -> Inputs:
    """Return the files of several runs as one; what each has read is left out.

    Raises:
        ChangedError: two runs have seen different files under one name.
    """
    if len(several) == 1:
        return several[0]
    files: dict[str, InputFile] = {}
    for inputs in several:
        for path, file in inputs.files.items():
            if not files.setdefault(path, file).may_be(file.identity):
                raise changed(path)
    return Inputs(files)


def known_version(text: str) -> FileIdentity | None:
    """Return the version that this context means by a name; None where it has opened nothing of that name.

    A storage that can demand a version with each request need not be asked for it first.
    """
    watch = _WATCH.get()
    return watch.known(text) if watch is not None else None


def tell_opened(source: Source) -> None:
    """Report an opened file to the watch of this context, if there is one.

    Raises:
        ChangedError: another file had this name before.
    """
    watch = _WATCH.get()
    if watch is not None:
        watch.opened(source)


def tell_read(text: str, start: int, content: memoryview | bytes) -> None:
    """Report some bytes that were read; their digest is taken here.

    Raises:
        ChangedError: other bytes were read there before.
    """
    watch = _WATCH.get()
    # XXH3 of bytes that are in the cache costs below 1 % of a merge.
    if watch is not None and watch.is_noting:
        import xxhash

        digest = f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"
        watch.read(Place(text, start, len(content)), digest)


def tell_digest(ref: TensorRef, digest: str) -> None:
    """Report the digest of a whole tensor that was read.

    Raises:
        ChangedError: other bytes were read there before.
    """
    watch = _WATCH.get()
    if watch is not None:
        watch.read(Place(ref.file, ref.start, ref.nbytes), digest)


def changed(path: str, what: str = "changed while it was read") -> ChangedError:
    """Return the error for an input that has changed; its hint is to run again."""
    return ChangedError(path, "", what, hint=_HINT)
