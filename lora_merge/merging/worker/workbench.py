"""One worker's workbench: the buffers that its tiles pass through, reused from tile to tile.

A tile takes a dozen calls into torch, and each gives up the interpreter's lock and takes it again. So every view that
a tile needs is made once for its shape and kept, in a `Frame`; the loop over the tiles makes none.
"""

from __future__ import annotations

from math import isfinite, prod
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.grid import Packed
from lora_merge.core.tensor import DTYPE_BITS, STORED_TYPES, TORCH_NAMES
from lora_merge.core.weight import FLOAT32, WEIGHT, PartRange, Storage, Tile
from lora_merge.merging.worker.adding import add

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from lora_merge.codecs import Codec, Encoder
    from lora_merge.codecs.grid import Grid
    from lora_merge.deltas.algebra import Product

    Choose = Callable[[torch.Tensor, Grid], torch.Tensor | Packed]
    """Values float32 ``[lines, in]`` and their grid → levels, if their codes are not stored yet."""

CUDA_DEPTH = 3
"""Tiles of one worker under way at once on a GPU: one is uploaded and one downloaded while one is computed."""

_MOST_FRAMES = 64
"""Frames that are kept; where there are more shapes, all are dropped and made again."""


class Parts(NamedTuple):
    """The storage of a tile, and the byte range of each part that belongs to it; of what is read, or of what is
    written.
    """

    storage: Storage
    ranges: Mapping[str, PartRange]

    def key(self) -> object:
        """Return what the sizes of the buffers depend on, apart from the tile's rows and columns."""
        if self.storage.is_dense:
            return self.storage.dtype
        return (self.storage, *(part.shape for part in self.ranges.values()))


class Frame:
    """The buffers of one tile, in its shape, on the CPU. What is read lands in `raw`; `encoded` is what is written.

    Float32 is stored as it is computed, so there all of them are one buffer.

    Shapes:
        values: float32 ``[rows, cols]``; stored, rounded: role → tensor, as the codec's `ranges` say; raw, encoded: role →
        the bytes of the same, on the host.
    """

    def __init__(self, place: Place, rows: int, columns: int, read: Parts, written: Parts) -> None:
        self.values = place.seen("values", "", (rows, columns), "F32")
        self.stored = self._views(place, "raw", read)
        self.rounded = self._views(place, "encoded", written)
        self.raw, self.encoded = _bytes(self.stored), _bytes(self.rounded)
        self._source = read.storage
        self._prepare(written.storage)

    def _views(self, place: Place, use: str, parts: Parts) -> dict[str, torch.Tensor]:
        """Return role → buffer in the shape of the part. A float32 part is the buffer that is computed in: no copy,
        no conversion.
        """
        if parts.storage == FLOAT32 and use in {"raw", "encoded"}:
            # One buffer is read into, changed and written from.
            return dict.fromkeys(parts.ranges, self.values)
        return {role: place.seen(use, role, part.shape, part.dtype) for role, part in parts.ranges.items()}

    def _prepare(self, target: Storage) -> None:
        """Choose the buffers in which a NaN or an infinity shows: floats that are written, or values before they are
        encoded.
        """
        import torch

        self._target = target
        floats = {getattr(torch, name) for name in TORCH_NAMES.values()}
        found = [part for part in self.rounded.values() if part.dtype in floats]
        self._floats = found if target.is_dense else [self.values, *found]
        self._axes = [tuple(range(part.dim())) for part in self._floats]
        # Filled by `torch.sum(out=…)` for every tile, so that the loop allocates nothing.
        self._totals = [self._total(part) for part in self._floats]
        self._packed: Packed | None = None

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.empty((), dtype=part.dtype)

    def decode(self, codec: Codec, tile: Tile) -> None:
        """Decode `stored` into `values`."""
        codec.decode(tile, self.stored, self.values, self._source)

    def add(self, stored: torch.Tensor, product: Product) -> bool:
        """Write a tile as it was read, ``[rows, cols]``, with a product added into `rounded`, if compiled code can. Return whether that
        is done.
        """
        if not add(stored, self.rounded[WEIGHT].view(self.values.shape), product):
            return False
        # All of it is finite, or it was not done.
        self._packed = None
        for total in self._totals:
            total.zero_()
        return True

    def encode(
        self,
        codec: Encoder,
        tile: Tile,
        choose: Choose | None = None,
        survey: torch.Tensor | None = None,
        stored: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Encode `values` into `rounded`. Sums for `is_finite` are taken here.

        Args:
            codec: of what is written.
            tile: which rows.
            choose: returns the levels of a tile; None for the nearest.
            survey: see `Encoder.grid`.
            stored: see `Encoder.grid`.
        """
        self._sum(self._encode(codec, tile, choose, survey, stored))

    def merge(
        self,
        codec: Encoder,
        tile: Tile,
        choose: Callable[[Grid], Packed | None],
        stored: Mapping[str, torch.Tensor],
    ) -> bool:
        """Merge a tile into `rounded` from what it is stored as, past `values`, if compiled code can. Return whether that is done.

        Args:
            codec: of what is written.
            tile: which rows.
            choose: stores codes for a grid; None where it cannot.
            stored: the parts that the tile was read from, whose scales are kept.
        """
        packed = choose(codec.grid(tile, self.values, self.rounded, self._target, None, stored))
        if packed is not None:
            self._sum(packed)
        return packed is not None

    def _sum(self, packed: Packed | None) -> None:
        """Take the sums for `is_finite`."""
        import torch

        self._packed = packed
        for part, axes, total in zip(self._floats, self._axes, self._totals, strict=True):
            if packed is None or part is not self.values:
                torch.sum(part, dim=axes, out=total)

    def _encode(
        self,
        codec: Encoder,
        tile: Tile,
        choose: Choose | None,
        survey: torch.Tensor | None,
        stored: Mapping[str, torch.Tensor] | None,
    ) -> Packed | None:
        if choose is None and self._target.is_dense:
            # One call of torch, which rounds to nearest, ties to even.
            rounded = self.rounded[WEIGHT]
            # In float32 the two are one buffer.
            if rounded is not self.values:
                rounded.copy_(self.values)
            return None
        grid = codec.grid(tile, self.values, self.rounded, self._target, survey, stored)
        values = self.values
        if not self._target.is_dense:
            lines = lines_of(tile)
            values = values.view(lines.n, lines.width)
        found = grid.nearest(values) if choose is None else choose(values, grid)
        if isinstance(found, Packed):
            return found
        grid.keep(found)
        return None

    def wait(self) -> None:
        """Wait until `encoded` is complete and `raw` may be overwritten. On the CPU both are so at once."""

    def is_finite(self) -> bool:
        """Return True when every value that is written is finite.

        A finite sum has no NaN and no infinity in it; only where the sum itself overflows are the extremes asked.
        """
        import torch

        if self._packed is not None and not isfinite(self._packed.total.item()):
            return False
        return all(
            isfinite(total.item()) or all(isfinite(end.item()) for end in torch.aminmax(part))
            for part, total in zip(self._floats, self._totals, strict=True)
            # Of a tile that compiled code encoded, the values may be those of another one.
            if self._packed is None or part is not self.values
        )


class CudaFrame(Frame):
    """The buffers of one tile on a GPU, with pinned buffers on the host for upload and download.

    Nothing waits for the GPU but `wait`; all is in the order of the thread's current stream.
    """

    def __init__(self, place: Place, rows: int, columns: int, read: Parts, written: Parts) -> None:
        self.values = place.seen("values", "", (rows, columns), "F32")
        self.stored = self._views(place, "uploaded", read)
        self.rounded = self._views(place, "downloading", written)
        self._landing = self._on_host(place, "raw", read)
        self._leaving = self._on_host(place, "encoded", written)
        self.raw, self.encoded = _bytes(self._landing), _bytes(self._leaving)
        self._source = read.storage
        self._prepare(written.storage)
        self._event = place.event

    def _on_host(self, place: Place, use: str, parts: Parts) -> dict[str, torch.Tensor]:
        return {role: place.seen(use, role, part.shape, part.dtype) for role, part in parts.ranges.items()}

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.empty((), dtype=part.dtype, pin_memory=True)

    def add(self, stored: torch.Tensor, product: Product) -> bool:
        """Return False: compiled code is for the CPU."""
        del stored, product
        return False

    def decode(self, codec: Codec, tile: Tile) -> None:
        """Upload the stored bytes, and decode them on the GPU."""
        for role, landing in self._landing.items():
            self.stored[role].copy_(landing, non_blocking=True)
        codec.decode(tile, self.stored, self.values, self._source)
        self._event.record()

    def encode(
        self,
        codec: Encoder,
        tile: Tile,
        choose: Choose | None = None,
        survey: torch.Tensor | None = None,
        stored: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Encode on the GPU, and download the result. Neither is waited for."""
        self._encode(codec, tile, choose, survey, stored)
        for role, leaving in self._leaving.items():
            # Pinned memory: only then does the copy run beside the kernels of other tiles.
            leaving.copy_(self.rounded[role], non_blocking=True)
        for part, total in zip(self._floats, self._totals, strict=True):
            total.copy_(part.sum(), non_blocking=True)
        self._event.record()

    def wait(self) -> None:
        """Wait until the GPU has done all that was asked for this frame."""
        self._event.synchronize()


class Place:
    """One set of buffers, each as large as the largest tile so far, and the frames that are views of them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._frames: dict[tuple[object, ...], Frame] = {}
        self.event: Any = None
        if device != "cpu":
            import torch

            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def frame(self, rows: int, columns: int, read: Parts, written: Parts) -> Frame:
        """Return the frame for a tile's shape and its two storages; it is made once and kept."""
        key = (rows, columns, read.key(), written.key())
        found = self._frames.get(key)
        if found is None:
            if len(self._frames) >= _MOST_FRAMES:
                # Frames hold views of the old buffer.
                self._frames.clear()
            made = Frame if self.event is None else CudaFrame
            found = made(self, rows, columns, read, written)
            self._frames[key] = found
        return found

    def seen(self, use: str, role: str, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """Return the first bytes of a buffer as a tensor. A buffer that is too small is replaced, and all frames with
        it.

        Args:
            use: what the buffer is for; role: of the part that it holds, if it holds one.
            shape: that is wanted; dtype: safetensors code.
        """
        import torch

        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        held = self._buffers.get((use, role))
        if held is None or held.numel() < nbytes:
            self._frames.clear()
            on_host = self.event is None or use in {"raw", "encoded"}
            held = torch.empty(
                nbytes,
                dtype=torch.uint8,
                device="cpu" if on_host else self._device,
                pin_memory=on_host and self.event is not None,
            )
            self._buffers[use, role] = held
        return held[:nbytes].view(getattr(torch, STORED_TYPES[dtype])).view(shape)


class Workbench:
    """The places of one worker, used in turn.

    Args:
        device: a torch device.
        depth: how many tiles may be under way at once.
    """

    def __init__(self, device: str, depth: int = 1) -> None:
        self.depth = depth
        self._places = [Place(device) for _ in range(depth)]
        self._next = 0

    @classmethod
    def of(cls, device: str) -> Workbench:
        """Return a workbench for a device: depth 1 on the CPU, `CUDA_DEPTH` on a GPU."""
        return cls(device, 1 if device == "cpu" else CUDA_DEPTH)

    def frame(self, rows: int, columns: int, read: Parts, written: Parts) -> Frame:
        """Return the frame of the next place. What that place held `depth` tiles ago is overwritten.

        Args:
            rows: of the tile; columns: of it.
            read: what is read; written: what is written.
        """
        place = self._places[self._next]
        self._next = (self._next + 1) % self.depth
        return place.frame(rows, columns, read, written)


def _bytes(tensors: Mapping[str, torch.Tensor]) -> dict[str, memoryview]:
    """Return the memory of tensors on the host as bytes, by role; nothing is copied."""
    import torch

    return {role: tensor.view(-1).view(torch.uint8).numpy().data for role, tensor in tensors.items()}
