"""The loop over the tiles of a tensor: read, decode, apply, encode, fill."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol, assert_never

from lora_merge.codecs import CODECS
from lora_merge.core.plan import Block, Copy, Merge
from lora_merge.core.shortage import memory_for
from lora_merge.core.stretches import Stretch
from lora_merge.core.tensor import TensorRecord
from lora_merge.deltas import ALGEBRAS, Factors, Part
from lora_merge.io.files import digest_text, new_digest, open_for_reading
from lora_merge.io.safetensors import RowReader, load
from lora_merge.merge.changing import Working, change
from lora_merge.merge.copying import Copier, CopySink
from lora_merge.merge.sample import Sample
from lora_merge.merge.stopwatch import Stopwatches
from lora_merge.merge.workbench import Workbench

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Iterator

    import torch

    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef
    from lora_merge.deltas.algebra import Changer
    from lora_merge.merge.stopwatch import Stopwatch
    from lora_merge.merge.workbench import Frame


class Sink(CopySink, Protocol):
    """Where bytes go; a writer is one."""

    def open(self, slot: TensorRef) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Open a slot; the result writes its next bytes."""


class Merger:
    """Carries out steps: ``merger(step)`` fills the step's slots and returns the record.

    It may be called from several threads; each keeps buffers of its own.

    Args:
        sink: where the bytes go.
        device: a torch device for the arithmetic.
        tile_elements: of a row tile; default: what suits the CPU's cache.
        watches: count the time.
    """

    def __init__(
        self,
        sink: Sink,
        device: str,
        tile_elements: int | None = None,
        watches: Stopwatches | None = None,
    ) -> None:
        self._sink = sink
        self._device = device
        self._tile_elements = tile_elements
        self._watches = watches or Stopwatches()
        self._factors = Factors(load)
        self._copier = Copier(sink, self._watches)
        self._local = threading.local()

    def __call__(self, step: Step) -> TensorRecord:
        """Carry out one step.

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: there is no memory left for it.
        """
        (slot,) = step.slots
        match step.op:
            case Copy():
                (record,) = self._copier(Stretch((step,)))
                return record
            case Merge() as op:
                with memory_for(f"merging {slot.name}"):
                    return self._merge(slot, op)
            case _:
                assert_never(step.op)

    def _merge(self, slot: TensorRef, op: Merge) -> TensorRecord:
        """Stream one tensor through float32, row tile by row tile."""
        watch, bench = self._watches.mine(), self._workbench("bench", Workbench.of)
        watch.start()
        codec, source, columns = CODECS[op.codec], op.parts[0], op.view.columns
        tiles = [tile for tile in op.tiles(self._tile_elements) if (tile[1] - tile[0]) * columns]
        sample = Sample(op, len(tiles))
        under_way: deque[Frame] = deque()
        with open_for_reading(source.file) as fd, self._sink.open(slot) as fill:
            rows = RowReader(fd, source, op.view.n_rows)
            working = Working(op, lambda delta: self._algebra(fd, op, delta, slot))
            filled = _Filled(fill, watch)
            for n, (start, end) in enumerate(tiles):
                changers = working.on(start, end)
                watch.lap("prepare")
                if len(under_way) == bench.depth:
                    filled.take(under_way.popleft())
                frame = bench.frame(end - start, columns, source.dtype, slot.dtype)
                rows.read_into(frame.raw, start)
                watch.lap("read")
                frame.decode(codec)
                watch.lap("decode")
                sample.before(n, frame)
                change(frame.values, start, end, op, changers)
                watch.lap("change")
                frame.encode(codec)
                sample.after(n, frame)
                watch.lap("encode")
                under_way.append(frame)
            for frame in under_way:
                filled.take(frame)
        text, survival = filled.digest(), sample.survival()
        return TensorRecord(slot.name, slot.file, slot.nbytes, text, finite=filled.finite, survival=survival)

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
        """Yield some rows of the stored weight in panels of whole columns; they are read once for each.

        It has a workbench of its own: tiles may be under way on the other.
        """
        import torch

        bench = self._workbench("survey", Workbench)
        codec, source = CODECS[op.codec], op.parts[0]
        rows = RowReader(fd, source, op.view.n_rows)
        for left, right in op.view.panels():
            panel = torch.empty((last - first, right - left), device=self._device)
            for start, end in op.tiles(self._tile_elements):
                low, high = max(start, first), min(end, last)
                if low < high:
                    frame = bench.frame(high - low, op.view.columns, source.dtype, source.dtype)
                    frame.wait()
                    rows.read_into(frame.raw, low)
                    frame.decode(codec)
                    panel[low - first : high - first] = frame.values[:, left:right]
            yield left, right, panel

    def _workbench(self, name: str, make: Callable[[str], Workbench]) -> Workbench:
        """Return a workbench of this thread."""
        found: Workbench | None = getattr(self._local, name, None)
        if found is None:
            import torch

            torch.get_num_threads()  # makes `one_torch_thread` hold here: MKL has its own number until then
            found = make(self._device)
            setattr(self._local, name, found)
        return found


class _Filled:
    """What of a slot is filled: tile after tile, in order."""

    def __init__(self, fill: Callable[[memoryview], None], watch: Stopwatch) -> None:
        self._fill, self._watch = fill, watch
        self._digest = new_digest()
        self.finite = True

    def take(self, frame: Frame) -> None:
        """Write a tile."""
        frame.wait()
        self._watch.lap("wait")
        self._fill(frame.encoded)
        self._watch.lap("write")
        self._digest.update(frame.encoded)
        self._watch.lap("digest")
        self.finite = frame.is_finite() and self.finite
        self._watch.lap("encode")

    def digest(self) -> str:
        """Return the digest of all that was written."""
        return digest_text(self._digest)
