"""One worker's workbench: the buffers that its tiles pass through, reused from tile to tile.

A tile takes a dozen calls into torch, and each gives up the interpreter's lock and takes it again. So every view that
a tile needs is made once for its shape and kept, in a `Frame`; the loop over the tiles makes none.
"""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import DTYPE_BITS, TORCH_NAMES

if TYPE_CHECKING:
    import torch

    from lora_merge.codecs import Codec

CUDA_DEPTH = 3
"""Tiles of one worker that are under way at once on a GPU: one is read and one written while one is computed."""

_MOST_FRAMES = 64
"""Shapes of tiles whose views are kept."""


class Frame:
    """The buffers of one tile, in its shape, on the CPU. What is read lands in `raw`; `encoded` is what is written.

    Float32 is stored as it is computed, so there all of them are one buffer.

    Shapes:
        values: float32 ``[rows, cols]``; rounded: the same in the dtype of the output; raw, encoded: bytes.
    """

    def __init__(self, place: Place, rows: int, columns: int, stored: str, written: str) -> None:
        import torch

        self.values = place.seen("values", rows, columns, "F32")
        self._stored = self.values if stored == "F32" else place.seen("raw", rows, columns, stored)
        self.rounded = self.values if written == "F32" else place.seen("encoded", rows, columns, written)
        self.raw, self.encoded = _bytes(self._stored), _bytes(self.rounded)
        self._total = torch.empty((), dtype=self.rounded.dtype)

    def decode(self, codec: Codec) -> None:
        """Make `values` of what was read."""
        codec.decode(self._stored, self.values)

    def encode(self, codec: Codec) -> None:
        """Make what is written of `values`."""
        import torch

        codec.encode(self.values, self.rounded)
        torch.sum(self.rounded, dim=(0, 1), out=self._total)

    def wait(self) -> None:
        """Wait until `encoded` is complete, and `raw` may be overwritten."""

    def is_finite(self) -> bool:
        """Return True when every value that is written is finite.

        A finite sum has no NaN and no infinity in it; only where the sum itself overflows are the extremes asked.
        """
        import torch

        return isfinite(self._total.item()) or all(
            isfinite(end.item()) for end in torch.aminmax(self.rounded)
        )


class CudaFrame(Frame):
    """The buffers of one tile on a GPU, and pinned ones on the host that it is uploaded from and downloaded to.

    Nothing waits for the GPU but `wait`; all is in the order of the thread's current stream.
    """

    def __init__(self, place: Place, rows: int, columns: int, stored: str, written: str) -> None:
        import torch

        self.values = place.seen("values", rows, columns, "F32")
        self._stored = place.seen("uploaded", rows, columns, stored)
        self.rounded = place.seen("downloading", rows, columns, written)
        self._landing = place.seen("raw", rows, columns, stored)
        self._leaving = place.seen("encoded", rows, columns, written)
        self.raw, self.encoded = _bytes(self._landing), _bytes(self._leaving)
        self._total = torch.empty((), dtype=self.rounded.dtype, pin_memory=True)
        self._event = place.event

    def decode(self, codec: Codec) -> None:
        """Upload what was read, and make `values` of it."""
        self._stored.copy_(self._landing, non_blocking=True)
        codec.decode(self._stored, self.values)
        self._event.record()

    def encode(self, codec: Codec) -> None:
        """Make what is written of `values`, and download it."""
        codec.encode(self.values, self.rounded)
        self._leaving.copy_(self.rounded, non_blocking=True)
        self._total.copy_(self.rounded.sum(), non_blocking=True)
        self._event.record()

    def wait(self) -> None:
        """Wait for the GPU."""
        self._event.synchronize()


class Place:
    """One set of buffers: each as large as the largest tile so far, and the frames that look at them."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}
        self._frames: dict[tuple[int, int, str, str], Frame] = {}
        self.event: Any = None
        if device != "cpu":
            import torch

            self.event = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def frame(self, rows: int, columns: int, stored: str, written: str) -> Frame:
        """Return the frame of a shape and two dtypes."""
        key = (rows, columns, stored, written)
        found = self._frames.get(key)
        if found is None:
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            made = Frame if self.event is None else CudaFrame
            found = made(self, *key)
            self._frames[key] = found
        return found

    def seen(self, role: str, rows: int, columns: int, dtype: str) -> torch.Tensor:
        """Return the beginning of a buffer as a matrix; a buffer that is too small is replaced, frames and all."""
        import torch

        nbytes = rows * columns * DTYPE_BITS[dtype] // 8
        held = self._buffers.get(role)
        if held is None or held.numel() < nbytes:
            self._frames.clear()
            on_host = self.event is None or role in {"raw", "encoded"}
            held = torch.empty(
                nbytes,
                dtype=torch.uint8,
                device="cpu" if on_host else self._device,
                pin_memory=on_host and self.event is not None,
            )
            self._buffers[role] = held
        return held[:nbytes].view(getattr(torch, TORCH_NAMES[dtype])).view(rows, columns)


class Workbench:
    """The places of one worker, taken in turn.

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
        """Return a workbench for a device, as deep as pays there."""
        return cls(device, 1 if device == "cpu" else CUDA_DEPTH)

    def frame(self, rows: int, columns: int, stored: str, written: str) -> Frame:
        """Return the next place's frame for a tile; what it held `depth` tiles ago is gone.

        Args:
            stored: dtype code of what is read; written: of what is written.
        """
        place = self._places[self._next]
        self._next = (self._next + 1) % self.depth
        return place.frame(rows, columns, stored, written)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return a host tensor's memory."""
    import torch

    return tensor.view(-1).view(torch.uint8).numpy().data
