"""Tensors merged once more for their digests, where the bytes themselves go nowhere."""

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
    from lora_merge.storage.copy_runs import Stretch
    from lora_merge.storage.sources import Source


@dataclass(frozen=True, slots=True)
class Remerging:
    """Workers that merge tensors once more, for their digests."""

    spec: MergeSpec
    steps: Mapping[TensorRef, Step]
    """What makes each slot."""

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[list[Callable[[TensorRef], tuple[TensorRef, str]]]]:
        """Yield workers for the threads of one process."""
        with self.spec.make(n) as workers:
            yield [partial(self._digest, worker) for worker in workers]

    def _digest(self, worker: Callable[[Piece], Done], slot: TensorRef) -> tuple[TensorRef, str]:
        done = worker(Piece(((0, (self.steps[slot],)),)))
        return slot, " ".join(record.digest for _, record in done.records)


@dataclass(frozen=True, slots=True)
class Nowhere:
    """Where bytes go of which only the digest is wanted."""

    @contextlib.contextmanager
    def copying(self, stretch: Stretch, source: Source) -> Iterator[Callable[[memoryview], None]]:
        """Open slots that take everything, and keep nothing."""
        del stretch, source
        yield lambda _: None

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Open a slot that takes everything, and keeps nothing."""
        del slot
        yield lambda _: None
