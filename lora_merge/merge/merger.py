"""The loop over the tiles of a tensor: read, decode, apply, encode, fill."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, assert_never

from lora_merge.codecs import CODECS
from lora_merge.core.plan import Block, Copy, Merge
from lora_merge.core.shortage import memory_for
from lora_merge.core.stretches import Stretch
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.deltas import ALGEBRAS, Factors, Part
from lora_merge.io.files import digest_text, new_digest, open_for_reading
from lora_merge.io.safetensors import RowReader, load
from lora_merge.merge.changing import Working, change
from lora_merge.merge.copying import Copier, CopySink
from lora_merge.merge.passing import Passing
from lora_merge.merge.sample import Sample
from lora_merge.merge.stopwatch import Stopwatches
from lora_merge.merge.workbench import Workbench

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lora_merge.codecs import Codec
    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Step
    from lora_merge.deltas.algebra import Changer
    from lora_merge.merge.stopwatch import Stopwatch
    from lora_merge.merge.workbench import Frame


class Sink(CopySink, Protocol):
    """Where bytes go; a writer is one."""

    def open(self, slot: TensorRef) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Open a slot; the result writes its next bytes."""


@dataclass(frozen=True, slots=True)
class Order:
    """One tensor of one output: what it is made by, and where it goes."""

    slot: TensorRef
    op: Merge
    sink: Sink

    def alike(self) -> tuple[object, ...]:
        """Return what orders have in common whose source may be read once for all of them."""
        return (self.op.codec, self.op.parts, self.op.view, self.op.reach == "tensor")


class Merger:
    """Carries out steps: ``merger(step)`` fills the step's slots and returns the record.

    It may be called from several threads; each keeps buffers of its own.

    Args:
        sink: where the bytes go.
        device: a torch device for the arithmetic.
        tile_elements: of a row tile; default: what suits the CPU's cache.
        watches: count the time.
        is_checked: project every row as it passes (`lora_merge.checks.projection`), and take digests of some tiles, for
            the verification that follows.
    """

    def __init__(
        self,
        sink: Sink,
        device: str,
        tile_elements: int | None = None,
        watches: Stopwatches | None = None,
        *,
        is_checked: bool = True,
    ) -> None:
        self._sink = sink
        self._is_checked = is_checked
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
                (record,) = self.together([Order(slot, op, self._sink)])
                return record
            case _:
                assert_never(step.op)

    def together(self, orders: Sequence[Order]) -> list[TensorRecord]:
        """Make one stored tensor into several, for which it is read and widened once; return their records.

        Args:
            orders: of which all have the same source, codec, view and tiles (`alike`).

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: there is no memory left for it.
        """
        with memory_for(f"merging {orders[0].slot.name}"):
            return self._merge(orders)

    def _merge(self, orders: Sequence[Order]) -> list[TensorRecord]:
        """Stream one tensor through float32, row tile by row tile, into every output that wants it."""
        watch, bench = self._watches.mine(), self._workbench("bench", Workbench.of)
        watch.start()
        op = orders[0].op
        codec, source, columns = CODECS[op.codec], op.parts[0], op.view.columns
        tiles = [tile for tile in op.tiles(self._tile_elements) if (tile[1] - tile[0]) * columns]
        with contextlib.ExitStack() as stack:
            fd = stack.enter_context(open_for_reading(source.file))
            rows = RowReader(fd, source, op.view.n_rows)
            outputs = [self._output(order, fd, tiles, stack, watch) for order in orders]
            loop = _Loop(bench, source, rows, codec, watch)
            for n, (start, end) in enumerate(tiles):
                shared = self._shared(source, rows, (start, end), op) if len(outputs) > 1 else None
                watch.lap("read")
                for output in outputs:
                    loop.tile(output, n, (start, end), shared)
            loop.finish()
        return [output.record(rows.digest()) for output in outputs]

    def _output(
        self,
        order: Order,
        fd: int,
        tiles: Sequence[tuple[int, int]],
        stack: contextlib.ExitStack,
        watch: Stopwatch,
    ) -> _Output:
        """Return an output's part of the work, its slot open."""
        fill = stack.enter_context(order.sink.open(order.slot))
        working = Working(order.op, lambda delta: self._algebra(fd, order.op, delta, order.slot))
        filled = _Filled(fill, watch)
        passing = Passing(order.op, order.slot, tiles) if self._is_checked else None
        return _Output(order, working, Sample(order.op, len(tiles)), filled, passing)

    def _shared(self, source: TensorRef, rows: RowReader, tile: tuple[int, int], op: Merge) -> Frame:
        """Return a tile of the base, widened, for several outputs."""
        start, end = tile
        frame = self._workbench("shared", Workbench).frame(
            end - start, op.view.columns, source.dtype, source.dtype
        )
        frame.wait()
        rows.read_into(frame.raw, start)
        frame.decode(CODECS[op.codec])
        return frame

    def _algebra(self, fd: int, op: Merge, delta: PlacedDelta, slot: TensorRef) -> Changer:
        """Return a delta with its factors loaded, on the device, and the weight surveyed if it asks for that."""
        factors = {
            role: tensor.to(self._device)
            for role, tensor in self._factors.of(delta.delta, delta.part).items()
        }
        algebra = ALGEBRAS[delta.algebra](delta, factors, slot.dtype)
        block = Block.of(op.view, delta.region.box)
        placed: Changer = Part(algebra, block) if delta.region.box else algebra
        if delta.reach == "columns":
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
        rows = RowReader(fd, source, op.view.n_rows, is_watched=True)
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


@dataclass(frozen=True, slots=True)
class _Output:
    """One output's part of the work on a tensor."""

    order: Order
    working: Working
    sample: Sample
    filled: _Filled
    passing: Passing | None
    """What looks at tiles as they pass."""

    def take(self, n: int, frame: Frame) -> None:
        """Write a tile, once it is complete."""
        self.filled.take(frame)
        if self.passing is not None:
            self.passing.after(n, frame)

    def record(self, source: str) -> TensorRecord:
        """Return the evidence, once all tiles are written.

        Args:
            source: the digest of the base's rows.

        Raises:
            CheckpointError: a factor cannot be read again.
        """
        slot, filled, passing = self.order.slot, self.filled, self.passing
        return TensorRecord(
            slot.name,
            slot.file,
            slot.nbytes,
            filled.digest(),
            finite=filled.finite,
            survival=self.sample.survival(),
            source=source,
            suspects=passing.suspects() if passing else None,
            blocks=passing.blocks() if passing else (),
        )


class _Loop:
    """The way of a tile through a worker's buffers, of one output after the other."""

    def __init__(
        self, bench: Workbench, source: TensorRef, rows: RowReader, codec: Codec, watch: Stopwatch
    ) -> None:
        self._bench, self._source, self._rows = bench, source, rows
        self._codec, self._watch = codec, watch
        self._under_way: deque[tuple[_Output, int, Frame]] = deque()

    def tile(self, output: _Output, n: int, limits: tuple[int, int], shared: Frame | None) -> None:
        """Read or take over a tile, change it and round it; what was begun before is written as room is needed.

        Args:
            output: whose tile.
            n: its number.
            limits: its rows.
            shared: the same tile as it is for every output; None for a single one, which reads it.
        """
        start, end = limits
        watch, order = self._watch, output.order
        changers = output.working.on(start, end)
        watch.lap("prepare")
        if len(self._under_way) == self._bench.depth:
            self._take()
        frame = self._bench.frame(end - start, order.op.view.columns, self._source.dtype, order.slot.dtype)
        if shared is None:
            self._rows.read_into(frame.raw, start)
            watch.lap("read")
            frame.decode(self._codec)
        else:
            frame.values.copy_(shared.values)
        watch.lap("decode")
        if output.passing is not None:
            output.passing.before(n, shared or frame)
            watch.lap("check")
        output.sample.before(n, frame)
        change(frame.values, start, end, order.op, changers)
        watch.lap("change")
        frame.encode(self._codec)
        output.sample.after(n, frame)
        watch.lap("encode")
        self._under_way.append((output, n, frame))

    def finish(self) -> None:
        """Write what is still under way."""
        while self._under_way:
            self._take()

    def _take(self) -> None:
        output, n, frame = self._under_way.popleft()
        output.take(n, frame)
        self._watch.lap("check")


class _Filled:
    """What of a slot is filled: tile after tile, in order."""

    def __init__(self, fill: Callable[[memoryview], None], watch: Stopwatch) -> None:
        self._fill, self._watch = fill, watch
        self._digest = new_digest()
        self.finite = True
        """False once a value was not."""

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
