"""Values of a stored weight, read some rows at a time, however many tensors store it."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any, Self

from lora_merge.codecs import CODECS
from lora_merge.codecs.host import host_grid, is_host
from lora_merge.core.tensor import STORED_TYPES, TORCH_NAMES
from lora_merge.core.view import Block, Spread, View
from lora_merge.core.weight import WEIGHT, Tile
from lora_merge.formats.safetensors import Squares, box_norm, same_values, tensor_digest
from lora_merge.runtime.host_floats import host_floats
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.reading import ReadAhead
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    import torch

    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import PartRange, Weight
    from lora_merge.modeling.pieces import Box
    from lora_merge.storage.sources import Source

    Numbers = np.ndarray[Any, np.dtype[np.float32]]

_BLOCK_ELEMENTS = 1 << 20
"""Values that are decoded at a time where nothing else decides it."""


def is_read_alone(weight: Weight) -> bool:
    """Return whether `WeightReader.numbers` reads a weight without torch, unless one of its scales is not a positive number."""
    if weight.storage.is_dense:
        return weight.dtype in TORCH_NAMES
    return is_host(weight.storage, weight.shape)


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

    @property
    def multiple(self) -> int:
        """Of how many rows of its matrix a range begins at a multiple, so that none is read beside it."""
        return self._codec.alignment(self.weight.shape, self._n_rows, self.weight.storage)[0]

    def widened(self, start: int, end: int) -> tuple[int, int]:
        """Return the rows to be read for some rows: a codec may have to begin and end at multiples."""
        shape, n_rows, multiple = self.weight.shape, self._n_rows, self.multiple
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

    def read_into(self, buffers: Mapping[str, memoryview], ranges: Mapping[str, PartRange]) -> None:
        """Fill the buffer of each part with some ranges of it.

        Raises:
            CheckpointError: a file ends too soon, or the disk cannot be read.
        """
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
        self.read_into({role: buffer.numpy().data for role, buffer in raw.items()}, ranges)
        parts = {
            role: raw[role].view(getattr(torch, STORED_TYPES[one.dtype])).view(one.shape)
            for role, one in ranges.items()
        }
        columns = math.prod(self.weight.shape) // max(self._n_rows, 1)
        out = torch.empty(tile.end - tile.start, columns)
        self._codec.decode(tile, parts, out, self.weight.storage)
        return out[start - tile.start : end - tile.start]

    def numbers(self, start: int, end: int) -> Numbers:
        """Return the same without torch, where the storage needs none (`is_read_alone`).

        Raises:
            CheckpointError: a file ends too soon, or the disk cannot be read.
        """
        import numpy as np

        weight = self.weight
        if not is_read_alone(weight):
            return self.values(start, end).numpy()
        tile = self.tile(start, end)
        ranges = self.ranges(tile)
        raw = {role: np.empty(one.nbytes, np.uint8) for role, one in ranges.items()}
        self.read_into({role: content.data for role, content in raw.items()}, ranges)
        if weight.storage.is_dense:
            return host_floats(raw[WEIGHT].data, weight.dtype).reshape(end - start, -1)
        grid = host_grid(tile, raw, weight.storage)
        return self.values(start, end).numpy() if grid is None else grid.values(grid.stored)

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
        """Fill a buffer with some ranges. What several tiles need alike (one scale for all, codes whose rows run across
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
    """Return the place of a buffer in memory: views of one buffer are created again, and their bytes stay."""
    import ctypes  # of no use for plain tensors

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
    """Return the Frobenius norm of a part of a weight; see `weight_norms`.

    Args:
        weight: the weight.
        box: a range per axis; empty for all of it.

    Raises:
        CheckpointError: a file ends too soon, or the disk cannot be read.
    """
    return weight_norms(weight, [box])[0]


def weight_norms(weight: Weight, boxes: Sequence[Box]) -> list[float]:
    """Return the Frobenius norms of some parts of a weight, summed in float64. Packed values are decoded once for all.

    Args:
        weight: the weight.
        boxes: of each part a range per axis; empty for all of the weight.

    Raises:
        CheckpointError: a file ends too soon, or the disk cannot be read.
    """
    # A plain tensor's box can be read without the columns beside it.
    if weight.plain is not None:
        return [box_norm(weight.plain, box) for box in boxes]
    view = View.of(weight.shape, stacked=True)
    outer = 2 if len(weight.shape) == 3 else 1
    blocks = [Block.of(view, box if outer == 2 else box[:1]) for box in boxes]
    inner = [tuple(slice(*limits) for limits in box[outer:]) for box in boxes]
    spread, totals, squares = Spread(blocks), [0.0] * len(blocks), Squares()
    with WeightReader(weight, view.n_rows, is_watched=True) as reader:
        for start, end in view.tiles(_BLOCK_ELEMENTS, reader.multiple):
            wanted = spread.meeting(start, end)
            values = reader.values(start, end) if wanted else None
            for n in wanted:
                assert values is not None
                for first, last in blocks[n].row_ranges():
                    rows = values[max(first - start, 0) : max(last - start, 0)]
                    part = rows.view(-1, *weight.shape[outer:])[(slice(None), *inner[n])]
                    totals[n] += squares.of(part.reshape(-1))
    return list(map(math.sqrt, totals))


def values_in_blocks(*weights: Weight) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yield the values of weights of one shape, some rows at a time: the first row, and float32 ``[rows, columns]`` of each.

    Raises:
        CheckpointError: a file ends too soon, or the disk cannot be read.
    """
    view = View.of(weights[0].shape, stacked=True)
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(WeightReader(weight, view.n_rows, is_watched=True)) for weight in weights
        ]
        # Ranges that suit each of them: nothing is decoded twice.
        multiple = math.lcm(*(reader.multiple for reader in readers))
        for start, end in view.tiles(_BLOCK_ELEMENTS, multiple):
            yield start, [reader.values(start, end) for reader in readers]


def same_weights(stored: Weight, other: Weight) -> bool:
    """Return True when a weight has the values of a stored one, after rounding to the dtype of the one that is plain.

    Raises:
        CheckpointError: a file ends too soon, or the disk cannot be read.
    """
    import torch

    if stored.plain is not None and other.plain is not None:
        return same_values(stored.plain, other.plain)
    if stored.shape != other.shape or not (stored.holds_floats and other.holds_floats):
        return False
    alike = stored.storage == other.storage and stored.parts.keys() == other.parts.keys()
    if alike and all(
        tensor_digest(ref) == tensor_digest(other.parts[role]) for role, ref in stored.parts.items()
    ):
        return True
    plain = next((weight.dtype for weight in (stored, other) if weight.plain is not None), "F32")
    dtype = getattr(torch, TORCH_NAMES[plain])
    return all(torch.equal(one.to(dtype), two.to(dtype)) for _, (one, two) in values_in_blocks(stored, other))
