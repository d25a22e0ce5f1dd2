"""What a worker merges without torch, by compiled code: which weights, and what is added to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge
from lora_merge.merging.worker.coded import CodedAddend, CodedFrames, is_coded
from lora_merge.merging.worker.plain import Addend, HostFrames, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.plan import Step
    from lora_merge.core.weight import Tile
    from lora_merge.merging.worker.filling import Encoded
    from lora_merge.merging.worker.workbench import Parts


def is_hosted(op: Merge) -> bool:
    """Return whether compiled code alone can write what a merge makes."""
    return is_plain(op) or is_coded(op)


def needs_torch(steps: Iterable[Step]) -> bool:
    """Return whether torch is needed to carry out some steps on the CPU, or to verify them."""
    return any(isinstance(step.op, Merge) and not is_hosted(step.op) for step in steps)


class Host:
    """The buffers of one worker for weights of both kinds."""

    def __init__(self) -> None:
        self._plain, self._coded = HostFrames(), CodedFrames()

    def frame(self, tile: Tile, columns: int, read: Parts, written: Parts) -> Encoded:
        """Return the frame of a tile.

        Args:
            tile: its rows; columns: of the weight.
            read: what is read; written: what is written.
        """
        if read.storage.is_dense:
            return self._plain.frame(tile.end - tile.start, columns)
        return self._coded.frame(read, written)


def addend_of(op: Merge) -> Addend | CodedAddend:
    """Return what is added to a weight, for which `is_hosted` is true.

    Raises:
        CheckpointError: a factor cannot be read.
    """
    return Addend(op) if is_plain(op) else CodedAddend(op)
