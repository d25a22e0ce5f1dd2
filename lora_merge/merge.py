"""One step → bytes: read, decode, apply, encode, fill. Knows no schedule and no destination."""

from __future__ import annotations

import contextlib
import importlib
import threading
from math import isfinite, prod
from typing import TYPE_CHECKING, Protocol, assert_never

from lora_merge.codecs import CODECS
from lora_merge.core.plan import Copy, Merge, tile_rows
from lora_merge.core.tensor import TORCH_NAMES, TensorRecord
from lora_merge.deltas import ALGEBRAS
from lora_merge.io.files import digest_text, new_digest, open_for_reading, read_into
from lora_merge.io.safetensors import load, tensor_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef
    from lora_merge.deltas import Algebra


class Sink(Protocol):
    """Where bytes go; a writer is one."""

    def copy(self, slot: TensorRef, source: TensorRef) -> None:
        """Fill a slot with the bytes of a stored tensor."""

    def open(self, slot: TensorRef) -> contextlib.AbstractContextManager[Callable[[int, memoryview], None]]:
        """Open a slot; the result writes a buffer at an offset inside the slot, in bytes."""


class Merger:
    """Carries out steps: ``merger(step)`` fills the step's slots and returns the record.

    It may be called from several threads; each keeps buffers of its own.

    Args:
        sink: where the bytes go.
        device: a torch device for the arithmetic.
    """

    def __init__(self, sink: Sink, device: str) -> None:
        self._sink = sink
        self._device = device
        self._local = threading.local()

    def __call__(self, step: Step) -> TensorRecord:
        """Carry out one step.

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
        """
        (slot,) = step.slots
        match step.op:
            case Copy(source=source):
                self._sink.copy(slot, source)
                return TensorRecord(slot.name, slot.file, slot.nbytes, tensor_digest(source), finite=True)
            case Merge() as op:
                return self._merge(slot, op)
            case _:
                assert_never(step.op)

    def _merge(self, slot: TensorRef, op: Merge) -> TensorRecord:
        """Stream one tensor through float32, row tile by row tile."""
        codec, weight = CODECS[op.codec], op.parts[0]
        algebras = [self._algebra(delta) for delta in op.deltas]
        row_elements = prod(weight.shape[1:])
        row_bytes = weight.nbytes // max(weight.shape[0] if weight.shape else 1, 1)
        digest, finite, written = new_digest(), True, 0
        with open_for_reading(weight.file) as fd, self._sink.open(slot) as fill:
            for start, end in tile_rows(weight.shape):
                n_elements = (end - start) * row_elements
                if not n_elements:
                    continue
                raw = self._buffer("raw", (end - start) * row_bytes)
                read_into(fd, raw.numpy().data, weight.start + start * row_bytes, weight.file)
                values = self._values(n_elements).view(end - start, row_elements)
                codec.decode(raw, weight.dtype, values)
                for algebra in algebras:
                    algebra.apply(values, start, end)
                encoded = self._buffer("encoded", n_elements * slot.nbytes // prod(slot.shape))
                codec.encode(values, slot.dtype, encoded)
                finite = finite and _is_finite(encoded, slot.dtype)
                view = encoded.numpy().data
                fill(written, view)
                digest.update(view)
                written += len(view)
        return TensorRecord(slot.name, slot.file, slot.nbytes, digest_text(digest), finite=finite)

    def _algebra(self, delta: DeltaSpec) -> Algebra:
        """Return a delta with its factors loaded, in float32 on the device."""
        import torch

        factors = {role: load(ref).to(self._device, torch.float32) for role, ref in delta.tensors.items()}
        return ALGEBRAS[delta.kind](delta, factors)

    def _buffer(self, role: str, nbytes: int) -> torch.Tensor:
        """Return a uint8 buffer of this thread, reused from tile to tile."""
        import torch

        held: torch.Tensor | None = getattr(self._local, role, None)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8)
            setattr(self._local, role, held)
        return held[:nbytes]

    def _values(self, n_elements: int) -> torch.Tensor:
        """Return a float32 buffer of this thread on the device, reused from tile to tile."""
        import torch

        held: torch.Tensor | None = getattr(self._local, "values", None)
        if held is None or held.numel() < n_elements:
            held = torch.empty(n_elements, dtype=torch.float32, device=self._device)
            self._local.values = held
        return held[:n_elements]


def _is_finite(encoded: torch.Tensor, dtype: str) -> bool:
    """Return True when every stored value is finite.

    A finite sum has no NaN and no infinity in it; only where the sum itself overflows are the extremes asked.
    """
    import torch

    values = encoded.view(getattr(torch, TORCH_NAMES[dtype]))
    return isfinite(float(values.sum())) or all(isfinite(float(end)) for end in torch.aminmax(values))


def pick_device(wanted: str) -> str:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    ``auto`` is the CPU: a merge is bound by reading and writing, and the CPU's bits are PEFT's.

    Raises:
        ValueError: there is no such device on this machine.
    """
    if wanted in {"auto", "cpu"}:
        return "cpu"
    import torch

    n_devices = torch.cuda.device_count()
    index = int(wanted.partition(":")[2] or 0)
    if index >= n_devices:
        raise ValueError(f"there is no {wanted}: torch {torch.__version__} sees {n_devices} CUDA devices")
    return wanted


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Give torch one thread per worker while it lasts: its own pool would fight the workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def torch_loading() -> Iterator[None]:
    """Import torch in the background, for what is done meanwhile without it; it is there on leaving.

    After an error nobody waits for it: an interrupt may have struck inside another import, and left a lock
    held that this one needs.
    """
    loading = threading.Thread(target=importlib.import_module, args=("torch",), name="torch", daemon=True)
    loading.start()
    yield
    loading.join()
