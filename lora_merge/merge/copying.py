"""Copies: bytes that no delta touches, moved in the kernel where it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lora_merge.core.tensor import TensorRecord
from lora_merge.io.safetensors import tensor_digest
from lora_merge.merge.stopwatch import Stopwatches

if TYPE_CHECKING:
    from lora_merge.core.stretches import Stretch


class CopySink(Protocol):
    """Where copies go; a writer is one."""

    def copy(self, stretch: Stretch) -> None:
        """Fill the slots of a stretch with the bytes of its sources."""


class Copier:
    """Carries out copies: ``copier(stretch)`` fills its slots and returns their records.

    A tensor's digest is taken of its *source*, right after the copy, while the page cache has it.

    Args:
        sink: where the bytes go.
        watches: count the time.
    """

    def __init__(self, sink: CopySink, watches: Stopwatches | None = None) -> None:
        self._sink, self._watches = sink, watches or Stopwatches()

    def __call__(self, stretch: Stretch) -> list[TensorRecord]:
        """Carry out the copies of one stretch.

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        watch = self._watches.mine()
        watch.start()
        self._sink.copy(stretch)
        watch.lap("copy")
        records = [
            TensorRecord(slot.name, slot.file, slot.nbytes, tensor_digest(source), finite=True)
            for slot, source in zip(stretch.slots, stretch.sources, strict=True)
        ]
        watch.lap("digest")
        return records
