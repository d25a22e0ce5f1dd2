"""The way of a tile through a worker's buffers: read or taken over, changed, encoded, written; once for each output."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.core.tensor import TensorRecord
from lora_merge.core.weight import WEIGHT, PartRange
from lora_merge.merging.worker.adding import compare_added, may_add
from lora_merge.merging.worker.changing import Working, change
from lora_merge.merging.worker.workbench import Parts
from lora_merge.storage.digests import digest_text, new_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence  # noqa: TC004 - a field's type, never evaluated

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.codecs import Encoder  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.codecs.grid import Grid, Packed
    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Merge, Step  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.weight import Tile  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.deltas.algebra import Changer  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.formats.weights import WeightReader
    from lora_merge.merging.worker.choosing import Choosing  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.merging.worker.passing import Passing  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.merging.worker.sample import Sample  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.merging.worker.stopwatch import Stopwatch
    from lora_merge.merging.worker.workbench import Frame, Workbench  # noqa: TC004 - a field's type, never evaluated


class Encoded(Protocol):
    """A tile that is to be written; `Frame` is one."""

    @property
    def raw(self) -> Mapping[str, memoryview]:
        """Role → the bytes that were read."""

    @property
    def encoded(self) -> Mapping[str, memoryview]:
        """Role → the bytes that are written."""

    def wait(self) -> None:
        """Wait until `encoded` is complete."""

    def is_finite(self) -> bool:
        """Return True when every value that is written is finite."""


@dataclass(frozen=True, slots=True)
class Filling:
    """One output's part of the work on one weight."""

    step: Step
    working: Working
    sample: Sample
    filled: Filled
    passing: Passing | None
    """What looks at the tiles for the verification that follows; None where nothing is verified."""

    survey: torch.Tensor | None
    """What the codec found out about all values (`Encoder.look`); None where it needs nothing."""

    op: Merge
    codec: Encoder
    """Of the storage that is written."""

    choosing: Choosing
    tiles: Sequence[Tile]
    can_add: bool
    """See `lora_merge.merging.worker.adding.can_add`."""

    bench: Workbench | None
    """A separate one, where its buffers are filled by several tiles; else the loop's."""

    def parts(self, tile: Tile, read: Parts) -> Parts:
        """Return the parts that a tile is written as, with the byte ranges of each."""
        found = written_parts(self.op, tile, read)
        missing = self.step.writes.keys() - found.ranges.keys()
        if not missing:
            return found
        # What says nothing about the values, such as a shape, is the same for every tile.
        slots = ((role, self.step.writes[role]) for role in sorted(missing))
        more = {role: PartRange(slot.dtype, slot.shape, ((0, slot.nbytes),)) for role, slot in slots}
        return Parts(found.storage, {**found.ranges, **more})

    def is_added(
        self, n: int, frame: Frame, stored: torch.Tensor, changers: Sequence[tuple[PlacedDelta, Changer]]
    ) -> bool:
        """Add the change to a tile as it was read, at once, if it is a plain product. Return whether it is encoded.

        Args:
            n: its number.
            frame: that it is encoded in.
            stored: the tile as it was read.
            changers: of its rows.
        """
        # A delta of some rows changes nothing in a tile of others.
        if not self.can_add or not self.choosing.is_plain or len(changers) != 1:
            return False
        tile = self.tiles[n]
        ((_, changer),) = changers
        product = changer.product(tile.start, tile.end)
        stored = stored.view(frame.values.shape)
        if product is None or not frame.add(stored, product):
            return False
        if self.sample.has(n):
            compare_added(self.sample, stored, frame.rounded[WEIGHT].view(stored.shape), product)
        return True

    def is_merged(
        self,
        n: int,
        frame: Frame,
        stored: Mapping[str, torch.Tensor],
        changers: Sequence[tuple[PlacedDelta, Changer]],
    ) -> bool:
        """Choose new codes for a tile from its stored ones, at once, if its change is a plain product. Return whether it is encoded.

        Args:
            n: its number.
            frame: that it is encoded in.
            stored: the parts that it was read from.
            changers: of its rows.
        """
        if not self.choosing.can_merge or len(changers) != 1:
            return False
        ((delta, changer),), tile = changers, self.tiles[n]
        product = changer.product(tile.start, tile.end)
        if product is None or not may_add(len(product.right)) or delta.adapter_weight != 1:
            return False

        def choose(grid: Grid) -> Packed | None:
            packed = self.choosing.merged(grid, product, tile.start, tile.end, [changer])
            if packed is not None and self.sample.has(n):
                self.sample.compare(frame, tile, stored, product, grid)
            return packed

        return frame.merge(self.codec, tile, choose, stored)

    def encode(
        self, frame: Frame, tile: Tile, stored: Mapping[str, torch.Tensor], changers: Sequence[Changer]
    ) -> None:
        """Encode a tile. Where the stored scales are kept, the codec sees the stored parts."""
        choose = None
        if not self.choosing.is_plain:
            choose = Chosen(self.sample, self.choosing, frame, tile, changers)
        frame.encode(self.codec, tile, choose, self.survey, stored if self.op.on_stored_grid else None)

    def take(self, n: int, frame: Encoded, written: Parts) -> None:
        """Write a tile whose encoding is complete (`Frame.wait`)."""
        full = written.ranges
        if self.op.fills_across and n + 1 < len(self.tiles):
            # What the next tile goes on filling is written after the last tile that it belongs to.
            following = self._ranges_of(n + 1)
            full = {role: found for role, found in full.items() if following.get(role) != found}
        self.filled.take(frame, full)
        if self.passing is not None:
            self.passing.after(n, frame, full)

    def _ranges_of(self, n: int) -> Mapping[str, PartRange]:
        """Return the byte ranges that a tile is written to."""
        tile, storage = self.tiles[n], self.op.source.storage
        return self.parts(tile, Parts(storage, CODECS[storage.codec].ranges(tile, storage))).ranges

    def records(self, sources: Mapping[str, str]) -> tuple[TensorRecord, ...]:
        """Return the records of all parts, once all tiles are written. The record of the first part speaks for the
        values.

        Args:
            sources: the digests of what was read of the base, by role.

        Raises:
            CheckpointError: a factor cannot be read again.
        """
        filled, passing = self.filled, self.passing
        suspects = passing.suspects() if passing else None
        return tuple(
            TensorRecord(
                slot.name,
                slot.file,
                slot.nbytes,
                filled.digest(role),
                finite=n > 0 or filled.finite,
                survival=None if n else self.sample.survival(self.choosing.effect()),
                source=sources,
                suspects=None if n else suspects,
                blocks=passing.blocks(role) if passing else (),
            )
            for n, (role, slot) in enumerate(self.step.writes.items())
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """Chooses the levels of one tile, once its grid is known."""

    sample: Sample
    choosing: Choosing
    frame: Frame
    tile: Tile
    changers: Sequence[Changer]

    def __call__(self, values: torch.Tensor, grid: Grid) -> torch.Tensor | Packed:
        """Return the levels of the tile's values, float32 ``[lines, in]``, if their codes are not stored yet."""
        self.sample.look(self.frame, self.tile, grid)
        return self.choosing.levels(values, grid, self.tile.start, self.tile.end, self.changers)


def written_parts(op: Merge, tile: Tile, read: Parts) -> Parts:
    """Return the parts of a tile that its storage has, and that are written; the scales of a stored grid are not."""
    if op.on_stored_grid:
        return Parts(op.target, {WEIGHT: read.ranges[WEIGHT]})
    if op.target == op.source.storage:
        return read
    return Parts(op.target, ENCODERS[op.target.codec].ranges(tile, op.target))


class Loop:
    """The loop's body: one tile through the buffers, for one output after the other. On a GPU several tiles are under
    way.
    """

    def __init__(self, bench: Workbench, reader: WeightReader, watch: Stopwatch) -> None:
        self._bench, self._reader, self._watch = bench, reader, watch
        self._codec = CODECS[reader.weight.storage.codec]
        self._under_way: deque[tuple[Filling, int, Frame, Parts]] = deque()

    def tile(self, output: Filling, n: int, tile: Tile, read: Parts, shared: Frame | None) -> None:
        """Read or take over a tile, change it and encode it. Earlier tiles are written when their buffers are needed.

        Args:
            output: whose tile.
            n: its number.
            tile: its rows.
            read: what they are stored as.
            shared: the same tile as it is for every output; None for a single one, which reads it.
        """
        start, end = tile.start, tile.end
        watch, op = self._watch, output.op
        changers = output.working.on(start, end)
        watch.lap("prepare")
        # The next frame's buffers are still in use by the oldest tile, so that one is written first.
        if len(self._under_way) == self._bench.depth:
            self._take()
        written = output.parts(tile, read)
        bench = output.bench or self._bench
        frame = bench.frame(end - start, op.view.columns, read, written)
        if shared is None:
            self._reader.read_into(frame.raw, read.ranges)
            watch.lap("read")
        # Before the change, which may be made in place.
        if output.passing is not None:
            output.passing.before(n, shared or frame)
            watch.lap("check")
        # Of several outputs too: the bits of one do not depend on what else is made.
        if output.is_added(n, frame, (shared or frame).stored[WEIGHT], changers):
            watch.lap("change")
        elif output.is_merged(n, frame, (shared or frame).stored, changers):
            watch.lap("encode")
        else:
            self._change(output, n, frame, tile, shared, changers)
        self._under_way.append((output, n, frame, written))
        if output.bench is not None:
            self.finish()

    def _change(
        self,
        output: Filling,
        n: int,
        frame: Frame,
        tile: Tile,
        shared: Frame | None,
        changers: list[tuple[PlacedDelta, Changer]],
    ) -> None:
        """Decode a tile, change it in float32, and encode it."""
        watch = self._watch
        if shared is None:
            frame.decode(self._codec, tile)
        else:
            frame.values.copy_(shared.values)
        watch.lap("decode")
        output.sample.before(n, frame)
        output.choosing.before(frame.values)
        change(frame.values, tile.start, tile.end, output.op, changers)
        watch.lap("change")
        output.encode(frame, tile, (shared or frame).stored, [changer for _, changer in changers])
        output.sample.after(n, frame, tile, (shared or frame).stored)
        watch.lap("encode")

    def finish(self) -> None:
        """Write the tiles that are still under way."""
        while self._under_way:
            self._take()

    def _take(self) -> None:
        output, n, frame, written = self._under_way.popleft()
        output.take(n, frame, written)
        self._watch.lap("check")


class Filled:
    """Writes the tiles of one weight in order, takes the digest of each part, and sees whether every value is finite."""

    def __init__(self, fills: Mapping[str, Callable[[memoryview], None]], watch: Stopwatch) -> None:
        self._fills, self._watch = fills, watch
        self._digests = {role: new_digest() for role in fills}
        self._done = dict.fromkeys(fills, 0)
        self.finite = True
        """False after a tile with NaN or infinity."""

    def take(self, frame: Encoded, ranges: Mapping[str, PartRange]) -> None:
        """Write a tile. Waits for the device first."""
        # On a GPU the download of this tile may still be under way.
        frame.wait()
        self._watch.lap("wait")
        pieces = [
            (role, piece)
            for role, found in ranges.items()
            for piece in self._new(role, found, frame.encoded[role])
        ]
        for role, piece in pieces:
            self._fills[role](piece)
        self._watch.lap("write")
        for role, piece in pieces:
            self._digests[role].update(piece)
        self._watch.lap("digest")
        self.finite = frame.is_finite() and self.finite
        self._watch.lap("encode")

    def _new(self, role: str, found: PartRange, content: memoryview) -> Iterator[memoryview]:
        """Yield the pieces of a part that are not written yet. The scale of a whole tensor comes with every tile, and
        is written once.
        """
        at, done = 0, self._done[role]
        for first, nbytes in found.ranges:
            if first == done:
                done += nbytes
                yield content if nbytes == len(content) else content[at : at + nbytes]
            else:
                assert first + nbytes <= done, f"{role} is not encoded in the order of its bytes"
            at += nbytes
        self._done[role] = done

    def digest(self, role: str) -> str:
        """Return the digest of all bytes of a part, once they are written."""
        return digest_text(self._digests[role])
