"""The way of a tile through a worker's buffers: read or taken over, changed, encoded, written, once for each output."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import TensorRecord
from lora_merge.merging.worker.changing import Working, change
from lora_merge.merging.worker.workbench import Parts
from lora_merge.storage.digests import digest_text, new_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.codecs import Codec  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.plan import Merge, Step  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.core.weight import PartRange, Tile
    from lora_merge.formats.weights import WeightReader
    from lora_merge.merging.worker.passing import Passing  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.merging.worker.sample import Sample  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.merging.worker.stopwatch import Stopwatch
    from lora_merge.merging.worker.workbench import Frame, Workbench


@dataclass(frozen=True, slots=True)
class Filling:
    """One output's part of the work on a weight."""

    step: Step
    working: Working
    sample: Sample
    filled: Filled
    passing: Passing | None
    """What looks at tiles as they pass."""

    survey: torch.Tensor | None
    """What its codec has to know of all values."""

    op: Merge
    codec: Codec
    """Of what is written."""

    is_same: bool
    """True where that is stored as what is read."""

    def parts(self, tile: Tile, read: Parts) -> Parts:
        """Return what a tile is written as."""
        return read if self.is_same else Parts(self.op.target, self.codec.ranges(tile, self.op.target))

    def encode(self, frame: Frame, tile: Tile, stored: Mapping[str, torch.Tensor]) -> None:
        """Encode a tile; a codec that stays the same sees the parts that the values were decoded from."""
        frame.encode(self.codec, tile, self.survey, stored if self.is_same else None)

    def take(self, n: int, frame: Frame, written: Parts) -> None:
        """Write a tile, once it is complete."""
        self.filled.take(frame, written.ranges)
        if self.passing is not None:
            self.passing.after(n, frame, written.ranges)

    def records(self, sources: Mapping[str, str]) -> tuple[TensorRecord, ...]:
        """Return the evidence, once all tiles are written: of each part, the first of which speaks for the values.

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
                survival=None if n else self.sample.survival(),
                source=sources,
                suspects=None if n else suspects,
                blocks=passing.blocks(role) if passing else (),
            )
            for n, (role, slot) in enumerate(self.step.writes.items())
        )


class Loop:
    """The way of a tile through a worker's buffers, of one output after the other."""

    def __init__(self, bench: Workbench, reader: WeightReader, watch: Stopwatch) -> None:
        self._bench, self._reader, self._watch = bench, reader, watch
        self._codec = CODECS[reader.weight.storage.codec]
        self._under_way: deque[tuple[Filling, int, Frame, Parts]] = deque()

    def tile(self, output: Filling, n: int, tile: Tile, read: Parts, shared: Frame | None) -> None:
        """Read or take over a tile, change it and encode it; what was begun before is written as room is needed.

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
        if len(self._under_way) == self._bench.depth:
            self._take()
        written = output.parts(tile, read)
        frame = self._bench.frame(end - start, op.view.columns, read, written)
        if shared is None:
            self._reader.read_into(frame.raw, tile, read.ranges)
            watch.lap("read")
            frame.decode(self._codec, tile)
        else:
            frame.values.copy_(shared.values)
        watch.lap("decode")
        if output.passing is not None:
            output.passing.before(n, shared or frame)
            watch.lap("check")
        output.sample.before(n, frame)
        change(frame.values, start, end, op, changers)
        watch.lap("change")
        output.encode(frame, tile, (shared or frame).stored)
        output.sample.after(n, frame, tile)
        watch.lap("encode")
        self._under_way.append((output, n, frame, written))

    def finish(self) -> None:
        """Write what is still under way."""
        while self._under_way:
            self._take()

    def _take(self) -> None:
        output, n, frame, written = self._under_way.popleft()
        output.take(n, frame, written)
        self._watch.lap("check")


class Filled:
    """What of a weight's places is filled: tile after tile, in order."""

    def __init__(self, fills: Mapping[str, Callable[[memoryview], None]], watch: Stopwatch) -> None:
        self._fills, self._watch = fills, watch
        self._digests = {role: new_digest() for role in fills}
        self._done = dict.fromkeys(fills, 0)
        self.finite = True
        """False once a value was not."""

    def take(self, frame: Frame, ranges: Mapping[str, PartRange]) -> None:
        """Write a tile."""
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
        """Yield what of a part is not written yet: the scale of a whole tensor comes with every tile."""
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
        """Return the digest of all that was written to a part."""
        return digest_text(self._digests[role])
