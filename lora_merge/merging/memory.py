"""Sinks without files: one keeps a merged tensor in memory, the other only measures how large its change is."""

from __future__ import annotations

import contextlib
from math import prod, sqrt
from typing import TYPE_CHECKING

from lora_merge.core.tensor import nbytes_of
from lora_merge.formats.weights import WeightReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Weight
    from lora_merge.storage.copy_runs import CopyRun
    from lora_merge.storage.sources import Source


class InMemory:
    """A sink that keeps one tensor in memory, written from its first byte to its last.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        self._content = bytearray(nbytes)

    def copying(
        self, run: CopyRun, source: Source
    ) -> contextlib.AbstractContextManager[Callable[[memoryview], None]]:
        """Return a context of a function that takes the next bytes of a copied tensor; the run must be of one
        tensor.
        """
        del source
        (slot,) = run.slots
        return self.open(slot)

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that takes the next bytes of the merged tensor."""
        del slot
        done = 0

        def write(buffer: memoryview) -> None:
            nonlocal done
            self._content[done : done + len(buffer)] = buffer
            done += len(buffer)

        yield write

    def tensor(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the content as a float32 tensor of a shape. It shares the memory with this object."""
        import torch

        return torch.frombuffer(self._content, dtype=torch.float32).view(shape)


class Norms:
    """A sink that measures a weight and its change, and keeps neither; it takes the merged weight in float32.

    Args:
        before: the weight as it is stored.
    """

    def __init__(self, before: Weight) -> None:
        self._before = before
        self._weight = self._delta = 0.0

    @contextlib.contextmanager
    def copying(self, run: CopyRun, source: Source) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that ignores its bytes: the change of a copied tensor is zero."""
        del run, source
        yield lambda _: None

    @contextlib.contextmanager
    def open(self, slot: TensorRef) -> Iterator[Callable[[memoryview], None]]:
        """Yield a function that takes the next bytes of the merged weight, in whole rows.

        Raises:
            CheckpointError: the weight cannot be read.
        """
        import torch

        del slot
        *outer, columns = self._before.shape if len(self._before.shape) > 1 else (*self._before.shape, 1)
        row_bytes = nbytes_of("F32", (columns,))
        done = 0
        # The base is read again here, since the worker's own tile is changed in place. Each call brings whole
        # rows, because tiles are rows.
        with WeightReader(self._before, prod(outer)) as reader:

            def compare(buffer: memoryview) -> None:
                nonlocal done
                after = torch.frombuffer(buffer, dtype=torch.float32)
                start, done = done, done + len(buffer) // row_bytes
                before = reader.values(start, done).view(-1)
                self._weight += float(before.square().sum())
                self._delta += float(before.sub_(after).square_().sum())

            yield compare

    @property
    def weight(self) -> float:
        """‖W‖, the Frobenius norm."""
        return sqrt(self._weight)

    @property
    def delta(self) -> float:
        """‖W′ - W‖, the Frobenius norm."""
        return sqrt(self._delta)
