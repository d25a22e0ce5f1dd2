"""Progress within whole files: what their sinks have taken, heard of in the process of the driver.

A worker gives back its records when a file is complete, and a file may be gigabytes. Workers that are threads of this process
tell in between; those in other processes are heard of at the end of each file, as before.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.storage.destination import FilePlace
from lora_merge.storage.objects.store import FileSink

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from lora_merge.core.report import Observer
    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRecord
    from lora_merge.storage.objects.store import Receipt

_Tell = Callable[[str, int], None]

_LISTENERS: dict[int, _Tell] = {}
"""Number of a place → who hears of its bytes. A copy of the place in another process finds nothing here."""

_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class ToldPlace:
    """A place for whole files (a `FilePlace`) that tells how many bytes its sinks have taken."""

    place: FilePlace
    number: int
    """Of its listener."""

    @contextlib.contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[FileSink]:
        """Begin a file.

        Raises:
            WriteError: the storage refused it.
        """
        tell = _LISTENERS.get(self.number)
        with self.place.file(name, nbytes) as sink:
            yield sink if tell is None else _ToldSink(sink, name, tell)

    def note(self, file: str, receipt: Receipt, records: Sequence[TensorRecord]) -> None:
        """Keep the evidence of a file.

        Raises:
            WriteError: the storage refused it.
        """
        self.place.note(file, receipt, records)


@dataclass(frozen=True, slots=True)
class _ToldSink:
    """A file of an output (a `FileSink`) that tells of each block."""

    sink: FileSink
    name: str
    tell: _Tell

    @property
    def receipt(self) -> Receipt:
        return self.sink.receipt

    def write(self, block: memoryview) -> None:
        self.sink.write(block)
        self.tell(self.name, block.nbytes)

    def copy(self, source: str, start: int, nbytes: int) -> bool:
        is_copied = self.sink.copy(source, start, nbytes)
        if is_copied:
            self.tell(self.name, nbytes)
        return is_copied


class FileProgress:
    """Tells an observer of the bytes of whole files, each once: while a file is written, and what is left at its end.

    Args:
        watch: hears of them, from one thread at a time.
    """

    def __init__(self, watch: Observer) -> None:
        self._watch, self._lock = watch, threading.Lock()
        self._told: Counter[str] = Counter()
        self._room: dict[str, int] = {}
        """Of each file: bytes of its tensors that are still to come. Its header does not count."""

    @contextlib.contextmanager
    def hearing(self, place: FilePlace, files: Sequence[OutputFile]) -> Iterator[ToldPlace]:
        """Yield a place for workers whose bytes are heard of until the block ends.

        Args:
            place: where they write.
            files: of the output.
        """
        self._room = {file.name: sum(slot.nbytes for slot in file.slots) for file in files}
        number = next(_NUMBERS)
        _LISTENERS[number] = self._hear
        try:
            yield ToldPlace(place, number)
        finally:
            del _LISTENERS[number]

    def _hear(self, file: str, nbytes: int) -> None:
        with self._lock:
            count = min(nbytes, self._room[file])
            self._room[file] -= count
            self._told[file] += count
            if count:
                self._watch.advance(count)

    def take(self, records: Iterable[TensorRecord]) -> None:
        """Tell of finished tensors, without the bytes that were heard of before."""
        with self._lock:
            for record in records:
                known = min(self._told[record.file], record.nbytes)
                self._told[record.file] -= known
                self._watch.advance(record.nbytes - known)
                self._watch.done(record.name)
