"""The loop over the tiles of a tensor: read, decode, apply, encode, fill."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, assert_never

from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.core.plan import Copy, Merge
from lora_merge.core.view import Block
from lora_merge.core.weight import Tile
from lora_merge.deltas import ALGEBRAS, Factors, Part
from lora_merge.formats.safetensors import load
from lora_merge.formats.weights import WeightReader
from lora_merge.merging.worker.adding import can_add
from lora_merge.merging.worker.changing import Working, change
from lora_merge.merging.worker.choosing import Choosing
from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.filling import Chosen, Filled, Filling, Loop, written_parts
from lora_merge.merging.worker.host import Host, addend_of, is_hosted
from lora_merge.merging.worker.passing import Passing
from lora_merge.merging.worker.sample import Sample
from lora_merge.merging.worker.stopwatch import Stopwatch
from lora_merge.merging.worker.tiling import tiles_of
from lora_merge.merging.worker.workbench import Parts, Workbench
from lora_merge.rounding.bands import Memory
from lora_merge.runtime.shortage import translate_out_of_memory
from lora_merge.runtime.torch_threads import one_torch_thread
from lora_merge.storage.copy_runs import CopyRun
from lora_merge.storage.destination import Sink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Rounding, Step  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.tensor import Survival, TensorRecord
    from lora_merge.deltas.algebra import Changer
    from lora_merge.merging.worker.coded import CodedAddend
    from lora_merge.merging.worker.filling import Encoded
    from lora_merge.merging.worker.plain import Addend
    from lora_merge.merging.worker.workbench import Frame


@dataclass(frozen=True, slots=True)
class Order:
    """One weight of one output: the step that makes it, and the sink that it goes to."""

    step: Step
    sink: Sink

    @property
    def op(self) -> Merge:
        """The step's operation, which is a merge."""
        assert isinstance(self.step.op, Merge)
        return self.step.op


def alike(op: Merge) -> tuple[object, ...]:
    """Return a key that is equal for merges which may share one reading of their source."""
    # Beside the source, what decides the tiles (`Merge.tiles`).
    return (op.source, op.view, op.reach == "tensor", op.multiple)


_FORESEEN_ELEMENTS = 1 << 18
"""Elements of a tensor that are compared to foresee what a rounding would keep."""


class Merger:
    """Carries out steps: ``merger(step)`` fills the step's places and returns a record for each. One thread may use
    it.

    It keeps buffers, and belongs to one thread.

    Args:
        sink: where the bytes go.
        device: a torch device for the arithmetic.
        tile_elements: of a row tile; default: what suits the CPU's cache.
        watch: counts the time.
        factors: those that mergers of the same run have in common; default: its own.
        is_checked: project part of every row as it passes (`lora_merge.checks.projection`), and take digests of some tiles, for
            the verification that follows.
    """

    def __init__(
        self,
        sink: Sink,
        device: str,
        tile_elements: int | None = None,
        watch: Stopwatch | None = None,
        factors: Factors | None = None,
        *,
        is_checked: bool = True,
    ) -> None:
        self._sink = sink
        self._is_checked = is_checked
        self._device = device
        self._tile_elements = tile_elements
        self._watch = watch or Stopwatch()
        self._factors = factors or Factors(load)
        self._benches: dict[str, Workbench] = {}
        self._memory = Memory()
        self._host = Host()

    def __call__(self, step: Step) -> tuple[TensorRecord, ...]:
        """Carry out one step.

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: memory ran out.
        """
        match step.op:
            case Copy():
                (copied,) = copy([(self._sink, CopyRun((step,)))], self._watch)
                return tuple(copied)
            case Merge():
                (merged,) = self.together([Order(step, self._sink)])
                return merged
            case _:
                assert_never(step.op)

    def together(self, orders: Sequence[Order]) -> list[tuple[TensorRecord, ...]]:
        """Merge one stored weight for several outputs; it is read and decoded once. Return the records of each
        output.

        Args:
            orders: all of the same source, view and tiles (`alike`).

        Raises:
            CheckpointError: a source cannot be read.
            WriteError: the disk is full or cannot be written.
            OutOfMemoryError: memory ran out.
        """
        with translate_out_of_memory(f"merging {orders[0].step.name}"):
            if self._device != "cpu" or not all(is_hosted(order.op) for order in orders):
                return self._merge(orders)
            found = self._merge_hosted(orders)
            if found is not None:
                return found
            # Torch may not have been needed so far.
            with one_torch_thread():
                return self._merge(orders)

    def foresee(
        self, op: Merge, rows: tuple[int, int], roundings: Mapping[str, Rounding | None]
    ) -> dict[str, Survival]:
        """Return what some roundings would keep of some rows. Nothing is written.

        Args:
            op: what is done to the weight.
            rows: a tile of it.
            roundings: by name.

        Raises:
            CheckpointError: a source cannot be read.
            OutOfMemoryError: memory ran out.
        """
        found, (start, end) = {}, rows
        codec, target = CODECS[op.source.storage.codec], ENCODERS[op.target.codec]
        bench = self._workbench("foreseeing", Workbench)
        with (
            translate_out_of_memory("looking at a sample"),
            WeightReader(op.source, op.view.n_rows, is_watched=True) as reader,
        ):
            tile = reader.tile(start, end)
            read = Parts(op.source.storage, reader.ranges(tile))
            changers = self._working(op).on(start, end)
            for name, rounding in roundings.items():
                one = replace(op, rounding=rounding)
                sample, choosing = (
                    Sample(one, 1, _FORESEEN_ELEMENTS),
                    Choosing(one, self._memory, is_accounted=True),
                )
                frame = bench.frame(end - start, op.view.columns, read, written_parts(one, tile, read))
                reader.read_into(frame.raw, read.ranges)
                frame.decode(codec, tile)
                sample.before(0, frame)
                choosing.before(frame.values)
                change(frame.values, start, end, one, changers)
                survey = None
                if not op.on_stored_grid and target.survey(op.target) == "tensor":
                    survey = target.look(frame.values, None, op.target)
                chosen = Chosen(sample, choosing, frame, tile, [changer for _, changer in changers])
                frame.encode(target, tile, chosen, survey, frame.stored if op.on_stored_grid else None)
                sample.after(0, frame, tile, frame.stored)
                frame.wait()
                survival = sample.survival(choosing.effect())
                if survival is not None:
                    found[name] = survival
        return found

    def _merge(self, orders: Sequence[Order]) -> list[tuple[TensorRecord, ...]]:
        """Stream one weight through float32, row tile by row tile, into every output that wants it."""
        watch, bench = self._watch, self._workbench("bench", Workbench.of)
        watch.start()
        op = orders[0].op
        tiles = self._tiles(op)
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(WeightReader(op.source, op.view.n_rows))
            outputs = [self._output(n, order, tiles, stack) for n, order in enumerate(orders)]
            loop = Loop(bench, reader, watch)
            watch.lap("prepare")
            for n, (start, end) in enumerate(tiles):
                tile = reader.tile(start, end)
                read = Parts(op.source.storage, reader.ranges(tile))
                # A single output reads into its own buffers. Several each change a copy of one decoded tile.
                shared = self._shared(reader, tile, op) if len(outputs) > 1 else None
                watch.lap("read")
                for output in outputs:
                    loop.tile(output, n, tile, read, shared)
            loop.finish()
            digests = reader.digests()
        # The last bytes of the slots are written when they are closed.
        watch.lap("write")
        found = [output.records(digests) for output in outputs]
        watch.lap("check")
        return found

    def _merge_hosted(self, orders: Sequence[Order]) -> list[tuple[TensorRecord, ...]] | None:
        """Merge without torch (`lora_merge.merging.worker.host`); return None where a value is not finite."""
        watch, op = self._watch, orders[0].op
        watch.start()
        tiles, columns = self._tiles(op), op.view.columns
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(WeightReader(op.source, op.view.n_rows))
            outputs = [self._output(n, order, tiles, stack) for n, order in enumerate(orders)]
            addends = [addend_of(order.op) for order in orders]
            watch.lap("prepare")
            for n, (start, end) in enumerate(tiles):
                tile = reader.tile(start, end)
                read = Parts(op.source.storage, reader.ranges(tile))
                frame = self._host.frame(tile, columns, read, outputs[0].parts(tile, read))
                reader.read_into(frame.raw, read.ranges)
                watch.lap("read")
                for output, addend in zip(outputs, addends, strict=True):
                    if not self._is_added(output, n, frame, addend):
                        return None
                    output.take(n, frame, output.parts(tile, read))
                    watch.lap("check")
            digests = reader.digests()
        watch.lap("write")
        for output, addend in zip(outputs, addends, strict=True):
            addend.account(output.choosing)
        found = [output.records(digests) for output in outputs]
        watch.lap("check")
        return found

    def _is_added(self, output: Filling, n: int, frame: Encoded, addend: Addend | CodedAddend) -> bool:
        """Add the change of one output to a tile; return False where a value is not finite."""
        tile = output.tiles[n]
        if output.passing is not None:
            output.passing.before(n, frame)
            self._watch.lap("check")
        if not addend.add(frame, tile):
            return False
        if output.sample.has(n):
            addend.compare(output.sample, frame, tile)
        self._watch.lap(addend.stage)
        return True

    def _tiles(self, op: Merge) -> list[tuple[int, int]]:
        """Return the row ranges of a weight that are not empty."""
        found = tiles_of(op, self._tile_elements)
        return [(start, end) for start, end in found if (end - start) * op.view.columns]

    def _output(
        self, number: int, order: Order, tiles: Sequence[tuple[int, int]], stack: contextlib.ExitStack
    ) -> Filling:
        """Return what one output needs for the loop; its slots stay open until the stack ends."""
        op, writes = order.op, order.step.writes
        codec = ENCODERS[op.target.codec]
        is_surveyed = not op.on_stored_grid and codec.survey(op.target) == "tensor"
        survey = self._survey(order) if is_surveyed else None
        fills = {role: stack.enter_context(order.sink.open(slot)) for role, slot in writes.items()}
        passing = Passing(op, writes, tiles) if self._is_checked else None
        # Codes that lie across the rows are filled by all tiles, so no other output may have the buffer.
        bench = self._workbench(f"held {number}", Workbench) if op.fills_across else None
        sample, filled = Sample(op, len(tiles)), Filled(fills, self._watch)
        places = [Tile(op.source.shape, op.view.n_rows, *rows) for rows in tiles]
        return Filling(
            order.step,
            self._working(op),
            sample,
            filled,
            passing,
            survey,
            op,
            codec,
            Choosing(op, self._memory),
            places,
            can_add(op),
            bench,
        )

    def _working(self, op: Merge) -> Working:
        """Return the deltas of a step; their factors are loaded when the first row needs them."""
        return Working(op, lambda delta: self._algebra(op, delta))

    def _survey(self, order: Order) -> torch.Tensor | None:
        """Return what the codec has to know of all values before it encodes the first: of this weight, and of those that are
        loaded as one with it. All values are computed for this, and a second time to be encoded: no tensor is held whole.
        """
        found, target = None, ENCODERS[order.op.target.codec]
        bench = self._workbench("looking", Workbench)
        for op in (order.op, *order.op.surveyed):
            working, codec = self._working(op), CODECS[op.source.storage.codec]
            # Watched, since no record has the digest of this reading.
            with WeightReader(op.source, op.view.n_rows, is_watched=True) as reader:
                for start, end in self._tiles(op):
                    changers, tile = working.on(start, end), reader.tile(start, end)
                    frame = self._read(bench, reader, tile, op.view.columns)
                    frame.decode(codec, tile)
                    change(frame.values, start, end, op, changers)
                    found = target.look(frame.values, found, order.op.target)
        return found

    def _read(self, bench: Workbench, reader: WeightReader, tile: Tile, columns: int) -> Frame:
        """Return a frame whose `raw` buffers hold the stored bytes of a tile."""
        read = Parts(reader.weight.storage, reader.ranges(tile))
        frame = bench.frame(tile.end - tile.start, columns, read, read)
        frame.wait()
        reader.read_into(frame.raw, read.ranges)
        return frame

    def _shared(self, reader: WeightReader, tile: Tile, op: Merge) -> Frame:
        """Return a decoded tile of the base that several outputs copy from."""
        frame = self._read(self._workbench("shared", Workbench), reader, tile, op.view.columns)
        frame.decode(CODECS[op.source.storage.codec], tile)
        return frame

    def _algebra(self, op: Merge, delta: PlacedDelta) -> Changer:
        """Return the algebra of a delta: factors loaded and on the device, the weight surveyed where it needs whole
        columns.
        """
        factors = {
            role: tensor.to(self._device)
            for role, tensor in self._factors.of(delta.delta, delta.part).items()
        }
        algebra = ALGEBRAS[delta.algebra](delta, factors, op.between_dtype)
        block = Block.of(op.view, delta.region.box)
        placed: Changer = algebra
        if delta.region.box:
            placed = Part(algebra, block, transposed=delta.region.transposed)
        # DoRA on a weight stored [in, out]: norms of columns must be known before the first row can be
        # changed.
        if delta.reach == "columns":
            ((first, last),) = block.row_ranges()
            placed.survey(self._panels(op, first, last))
        return placed

    def _panels(self, op: Merge, first: int, last: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield some rows of the stored weight in panels of whole columns: left, right, values. The rows are read
        once for each panel.

        A workbench is made for this, since tiles may be under way on the other one.
        """
        import torch

        bench = self._workbench("survey", Workbench)
        codec = CODECS[op.source.storage.codec]
        with WeightReader(op.source, op.view.n_rows, is_watched=True) as reader:
            for left, right in op.view.panels():
                panel = torch.empty((last - first, right - left), device=self._device)
                for start, end in op.tiles(self._tile_elements):
                    low, high = max(start, first), min(end, last)
                    if low < high:
                        tile = reader.tile(*reader.widened(low, high))
                        frame = self._read(bench, reader, tile, op.view.columns)
                        frame.decode(codec, tile)
                        rows = frame.values[low - tile.start : high - tile.start]
                        panel[low - first : high - first] = rows[:, left:right]
                yield left, right, panel

    def _workbench(self, name: str, make: Callable[[str], Workbench]) -> Workbench:
        if name not in self._benches:
            import torch

            torch.get_num_threads()  # makes `one_torch_thread` hold here: MKL has its own number until then
            self._benches[name] = make(self._device)
        return self._benches[name]
