"""Values of a stored weight, read some rows at a time, however many tensors store it."""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import TYPE_CHECKING, Self

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.weight import Tile
from lora_merge.formats.safetensors import box_norm, tensor_digest
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.reading import ReadAhead
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import PartRange, Weight
    from lora_merge.modeling.pieces import Box
    from lora_merge.storage.sources import Source

_NORM_ELEMENTS = 1 << 20


class WeightReader:
    """Reads rows of a stored weight, part by part, and has the disk fetch the next ones.

    A context: its files are open inside.

    Args:
        weight: what is read.
        n_rows: that it is divided into.
        is_watched: True where `digests` are not asked for.
    """

    def __init__(self, weight: Weight, n_rows: int, *, is_watched: bool = False) -> None:
        self.weight, self._n_rows, self._is_watched = weight, n_rows, is_watched
        self._codec = CODECS[weight.storage.codec]
        self._stack = contextlib.ExitStack()
        self._parts: dict[str, _PartReader] = {}
        self._buffers: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # Parts in one file share one open source.
            sources: dict[str, Source] = {}
            for role, ref in self.weight.parts.items():
                if ref.file not in sources:
                    sources[ref.file] = stack.enter_context(open_source(ref.file))
                self._parts[role] = _PartReader(
                    sources[ref.file],
                    ref,
                    is_watched=self._is_watched,
                    is_kept=not self.weight.storage.is_dense,
                )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def tile(self, start: int, end: int) -> Tile:
        """Return the `Tile` of a range of rows, as codecs take it."""
        return Tile(self.weight.shape, self._n_rows, start, end)

    def widened(self, start: int, end: int) -> tuple[int, int]:
        """Return the rows to be read for some rows: a codec may have to begin and end at multiples."""
        shape, n_rows = self.weight.shape, self._n_rows
        multiple, _ = self._codec.alignment(shape, n_rows, self.weight.storage)
        if multiple == 1 or start == end:
            return start, end
        # Multiples are counted within each matrix of a stack, and the last tile of a matrix may be shorter.
        is_stacked = len(shape) == 3 and n_rows == shape[0] * shape[1]
        matrix = shape[1] if is_stacked else n_rows
        last = (end - 1) % matrix + 1
        return start - start % matrix % multiple, end - last + min(matrix, -(-last // multiple) * multiple)

    def ranges(self, tile: Tile) -> Mapping[str, PartRange]:
        """Return, by role, the byte ranges of the parts that a tile needs."""
        return self._codec.ranges(tile, self.weight.storage)

    def read_into(
        self, buffers: Mapping[str, memoryview], tile: Tile, ranges: Mapping[str, PartRange]
    ) -> None:
        """Fill the buffer of each part with the bytes that a tile needs.

        Raises:
            CheckpointError: a file ends too soon, or the disk cannot be read.
        """
        del tile
        for role, found in ranges.items():
            self._parts[role].read_into(buffers[role], found)

    def values(self, start: int, end: int) -> torch.Tensor:
        """Return some rows as float32 ``[rows, columns]``, in newly allocated memory.

        Raises:
            CheckpointError: a file ends too soon, or the disk cannot be read.
        """
        import torch

        tile = self.tile(*self.widened(start, end))
        ranges = self.ranges(tile)
        raw = {role: self._buffer(role, one.nbytes) for role, one in ranges.items()}
        self.read_into({role: buffer.numpy().data for role, buffer in raw.items()}, tile, ranges)
        parts = {
            role: raw[role].view(getattr(torch, STORED_TYPES[one.dtype])).view(one.shape)
            for role, one in ranges.items()
        }
        columns = math.prod(self.weight.shape) // max(self._n_rows, 1)
        out = torch.empty(tile.end - tile.start, columns)
        self._codec.decode(tile, parts, out, self.weight.storage)
        return out[start - tile.start : end - tile.start]

    def _buffer(self, role: str, nbytes: int) -> torch.Tensor:
        """Return memory for a part. It is kept for the next rows, which may need the same bytes of it."""
        import torch

        held = self._buffers.get(role)
        if held is None or held.numel() != nbytes:
            held = self._buffers[role] = torch.empty(nbytes, dtype=torch.uint8)
        return held

    def digests(self) -> dict[str, str]:
        """Return the digest of each part. A part that was read from end to end is not read again for it.

        Raises:
            CheckpointError: a part has to be read again, and cannot be.
        """
        return {role: part.digest() for role, part in self._parts.items()}


class _PartReader:
    """Reads one part, and takes its digest while the bytes come in order.

    Args:
        source: open.
        ref: the part.
        is_watched: True where no digest is asked for.
        is_kept: True where nothing else writes into the buffers that it fills. A dense tile is changed where it is read.
    """

    def __init__(self, source: Source, ref: TensorRef, *, is_watched: bool, is_kept: bool) -> None:
        self._ref, self._done, self._is_kept = ref, 0, is_kept
        self._ahead = ReadAhead(source, ref.start, ref.end, is_watched=is_watched)
        self._digest = new_digest()
        self._filled: dict[int, tuple[memoryview, tuple[tuple[int, int], ...]]] = {}
        """Address of a buffer → the buffer, and the ranges that it holds. Kept, so that no other gets its address."""

    def read_into(self, buffer: memoryview, wanted: PartRange) -> None:
        """Fill a buffer with some ranges. What several tiles need alike (one scale for all, codes whose rows lie across
        those of the weight) is read once for each buffer.
        """
        address = _address(buffer) if self._is_kept else 0
        if self._is_kept and address in self._filled and self._filled[address][1] == wanted.ranges:
            return
        at = 0
        for first, nbytes in wanted.ranges:
            piece = buffer[at : at + nbytes] if len(wanted.ranges) > 1 else buffer
            self._ahead.read_into(piece, self._ref.start + first)
            # Bytes in order go into the digest as they pass. If any came in another order, the part is read again
            # for it.
            if first == self._done:
                self._digest.update(piece)
                self._done += nbytes
            at += nbytes
        if self._is_kept:
            self._filled[address] = buffer, wanted.ranges

    def digest(self) -> str:
        if self._done == self._ref.nbytes:
            return digest_text(self._digest)
        return tensor_digest(self._ref)


def _address(buffer: memoryview) -> int:
    """Return the place of a buffer in memory: views of one buffer are made anew, and their bytes stay."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer.nbytes else 0


def values_of(weight: Weight) -> torch.Tensor:
    """Return a whole weight as float32, in its shape.

    Raises:
        CheckpointError: a file ends too soon, or the disk cannot be read.
    """
    n_rows = weight.shape[0] if weight.shape else 1
    with WeightReader(weight, n_rows, is_watched=True) as reader:
        return reader.values(0, n_rows).view(weight.shape)


def weight_norm(weight: Weight, box: Box = ()) -> float:
    """Return the Frobenius norm of a part of a weight, read some rows at a time and summed in float64.

    Args:
        weight: the weight.
        box: a range per axis; empty for all of it.

    Raises:
        CheckpointError: a file ends too soon, or the disk cannot be read.
    """
    import torch

    # A plain tensor's box can be read without the columns beside it.
    if weight.plain is not None:
        return box_norm(weight.plain, box)
    first, *others = box or tuple((0, size) for size in weight.shape) or ((0, 1),)
    inner = weight.shape[1:]
    step = max(1, _NORM_ELEMENTS // max(math.prod(inner), 1))
    total = 0.0
    with WeightReader(weight, weight.shape[0] if weight.shape else 1, is_watched=True) as reader:
        for start in range(first[0], first[1], step):
            end = min(start + step, first[1])
            rows = reader.values(start, end).view(end - start, *inner)
            part = rows[(slice(None), *(slice(*limits) for limits in others))]
            total += float(part.square().sum(dtype=torch.float64))
    return math.sqrt(total)
