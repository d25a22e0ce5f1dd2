"""Merges tensors again for their digests, without writing them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lora_merge.core.plan import Step
from lora_merge.core.tensor import TensorRef
from lora_merge.core.work import Piece
from lora_merge.merging.worker import MergeSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.core.work import Done
    from lora_merge.storage.copy_runs import CopyRun
    from lora_merge.storage.sources import Source


@dataclass(frozen=True, slots=True)
class Remerging:
    """A spec of workers that merge tensors again and return their digests."""

    spec: MergeSpec
    steps: Mapping[TensorRef, Step]
    """Main slot of a tensor → the step that makes it."""

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[Callable[[TensorRef], tuple[TensorRef, str]]]]:
        """Yield n workers for the threads of one process: slot → slot, and the digests of its parts."""
        with self.spec.make(n) as workers:
            yield [partial(self._digest, worker) for worker in workers]

    def _digest(self, worker: Callable[[Piece], Done], slot: TensorRef) -> tuple[TensorRef, str]:
        # One step, for the output with the number 0.
        done = worker(Piece(((0, (self.steps[slot],)),)))
        return slot, " ".join(record.digest for _, record in done.records)


@dataclass(frozen=True, slots=True)
class Nowhere:
    """A sink that keeps nothing, for bytes whose digest alone is wanted."""

    @contextlib.contextmanager
    def copying(self, run: CopyRun, source: Source) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that takes the bytes of copied tensors."""
        del run, source
        yield lambda _: None

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that takes the bytes of one tensor."""
        del slot
        yield lambda _: None
