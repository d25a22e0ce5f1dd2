"""One step → bytes: read, decode, apply, encode, fill. Knows no schedule and no destination."""

from __future__ import annotations

import contextlib
import importlib
import threading
from math import isfinite
from typing import TYPE_CHECKING, Protocol, assert_never

from lora_merge.codecs import CODECS
from lora_merge.core.plan import Block, Copy, Merge, Spread
from lora_merge.core.tensor import TORCH_NAMES, Survival, TensorRecord
from lora_merge.deltas import ALGEBRAS, Factors, Part, combine
from lora_merge.io.files import digest_text, new_digest, open_for_reading, read_into
from lora_merge.io.safetensors import load, tensor_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef
    from lora_merge.deltas.algebra import Changer


_COPYING = ("concurrent.futures.thread", "xxhash")
"""What is imported on the way, when tensors are copied."""

SAMPLE_ELEMENTS = 1 << 14
"""Elements of a merged tensor that are looked at again, to see what the stored dtype kept of the delta."""


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
        self._factors = Factors(load)
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
        import torch

        torch.get_num_threads()  # makes `one_torch_thread` hold in this thread: MKL has its own number until then
        codec = CODECS[op.codec]
        digest, finite, written, survival = new_digest(), True, 0, None
        tiles = op.tiles()
        dense = any(delta.kind != "rows" for delta in op.deltas)  # a sample would miss a few trained rows
        with open_for_reading(op.parts[0].file) as fd, self._sink.open(slot) as fill:
            working = _Working(op, lambda delta: self._algebra(fd, op, delta, slot))
            for n, (start, end) in enumerate(tiles):
                if not (end - start) * op.view.columns:
                    continue
                changers = working.on(
                    start, end
                )  # a survey uses the same buffers, so it comes before the tile
                values = self._tile(fd, op, start, end)
                sample = _Sample(values) if dense and n == len(tiles) // 2 else None
                _change(values, start, end, op, changers)
                encoded = self._buffer("encoded", (end - start) * (slot.nbytes // op.view.n_rows))
                codec.encode(values, slot.dtype, encoded)
                if sample is not None:
                    survival = sample.survival(values, encoded, slot.dtype)
                finite = finite and _is_finite(encoded, slot.dtype)
                view = encoded.numpy().data
                fill(written, view)
                digest.update(view)
                written += len(view)
        text = digest_text(digest)
        return TensorRecord(slot.name, slot.file, slot.nbytes, text, finite=finite, survival=survival)

    def _algebra(self, fd: int, op: Merge, delta: DeltaSpec, slot: TensorRef) -> Changer:
        """Return a delta with its factors loaded, on the device, and the weight surveyed if it asks for that."""
        factors = {role: tensor.to(self._device) for role, tensor in self._factors.of(delta).items()}
        made = ALGEBRAS[delta.kind]
        algebra = made(delta, factors, slot.dtype)
        block = Block.of(op.view, delta.region.at)
        placed: Changer = Part(algebra, block) if delta.region.at else algebra
        if made.reach(delta) == "columns":
            ((first, last),) = block.row_ranges()
            placed.survey(self._panels(fd, op, first, last))
        return placed

    def _panels(self, fd: int, op: Merge, first: int, last: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield some rows of the stored weight in panels of whole columns; they are read once for each."""
        import torch

        for left, right in op.view.panels():
            panel = torch.empty((last - first, right - left), device=self._device)
            for start, end in op.view.tiles():
                low, high = max(start, first), min(end, last)
                if low < high:
                    panel[low - first : high - first] = self._tile(fd, op, low, high)[:, left:right]
            yield left, right, panel

    def _tile(self, fd: int, op: Merge, start: int, end: int) -> torch.Tensor:
        """Return some rows of the stored weight, float32 ``[end - start, cols]``, in a buffer of this thread."""
        source, columns = op.parts[0], op.view.columns
        row_bytes = source.nbytes // op.view.n_rows
        raw = self._buffer("raw", (end - start) * row_bytes)
        read_into(fd, raw.numpy().data, source.start + start * row_bytes, source.file)
        values = self._values((end - start) * columns).view(end - start, columns)
        CODECS[op.codec].decode(raw, source.dtype, values)
        return values

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


class _Working:
    """The algebras of a step: each is made when the first of its rows comes, and dropped after the last."""

    def __init__(self, op: Merge, make: Callable[[DeltaSpec], Changer]) -> None:
        self._make, self._deltas = make, op.deltas
        self._spread = Spread(Block.of(op.view, delta.region.at) for delta in op.deltas)
        self._made: dict[int, Changer] = {}

    def on(self, start: int, end: int) -> list[tuple[DeltaSpec, Changer]]:
        """Return what changes some rows, in order."""
        self._made = {
            n: self._made[n] if n in self._made else self._make(self._deltas[n])
            for n in self._spread.meeting(start, end)
        }
        return [(self._deltas[n], changer) for n, changer in self._made.items()]


_LOOKING_BACK = frozenset({"dora"})
"""Kinds of delta that look at the weight as it was before the others."""


def _change(
    values: torch.Tensor, start: int, end: int, op: Merge, changers: list[tuple[DeltaSpec, Changer]]
) -> None:
    """Apply every delta of a step to a row tile, in place."""
    if op.combination is not None:
        values.add_(_combined(values, start, end, op, changers))
        return
    several = len(changers) > 1 and any(delta.kind in _LOOKING_BACK for delta, _ in changers)
    base = values.clone() if several else values
    for delta, changer in changers:
        if delta.weight == 1:
            changer.apply(values, base, start, end)
        else:
            values.add_(_difference(values, start, end, [changer]), alpha=delta.weight)


def _combined(
    values: torch.Tensor, start: int, end: int, op: Merge, changers: list[tuple[DeltaSpec, Changer]]
) -> torch.Tensor:
    """Return the combined change of several adapters to a whole tensor."""
    assert op.combination is not None
    changes, weights = [], []
    for adapter in sorted({delta.adapter for delta, _ in changers}):
        own = [(delta, changer) for delta, changer in changers if delta.adapter == adapter]
        changes.append(_difference(values, start, end, [changer for _, changer in own]))
        weights.append(own[0][0].weight)
    if op.view.blocks > 1:
        changes = [change.view(op.view.blocks, op.view.rows, op.view.columns) for change in changes]
    return combine(changes, weights, op.combination).view(values.shape)


def _difference(weight: torch.Tensor, start: int, end: int, changers: Iterable[Changer]) -> torch.Tensor:
    """Return what algebras change in a weight, which stays as it is."""
    changed = weight.clone()
    for changer in changers:
        changer.apply(changed, weight, start, end)
    return changed.sub_(weight)


class _Sample:
    """Some rows of a tile before the merge, to see afterwards how much of the delta its dtype kept."""

    def __init__(self, values: torch.Tensor) -> None:
        n_rows, n_columns = values.shape
        self._rows = slice(0, max(1, min(n_rows, SAMPLE_ELEMENTS // max(n_columns, 1))))
        self._before = values[self._rows].clone()

    def survival(self, values: torch.Tensor, encoded: torch.Tensor, dtype: str) -> Survival:
        """Return what became of the delta in these rows."""
        import torch

        stored = encoded.view(getattr(torch, TORCH_NAMES[dtype])).view(values.shape)
        wanted = values[self._rows] - self._before
        kept = stored[self._rows].to(values.device, torch.float32) - self._before
        touched = wanted != 0
        n_touched = int(touched.sum())
        unchanged = int(((kept == 0) & touched).sum())
        return Survival(
            weight_norm=float(torch.linalg.vector_norm(self._before)),
            delta_norm=float(torch.linalg.vector_norm(wanted)),
            error_norm=float(torch.linalg.vector_norm(kept - wanted)),
            unchanged=unchanged / n_touched if n_touched else 0.0,
        )


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
    held that this one needs. What copying imports is imported before, because Python swallows an interrupt that
    strikes while it tidies up after an import, and keeps the lock.
    """
    for name in _COPYING:
        importlib.import_module(name)
    loading = threading.Thread(target=importlib.import_module, args=("torch",), name="torch", daemon=True)
    loading.start()
    yield
    loading.join()
