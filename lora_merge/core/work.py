"""Work as values: what a worker is made from, what it is given, and what it gives back.

Everything can be pickled: a worker may be a thread, a process, or on another machine. It holds no open file, lock or output.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from lora_merge.core.identity import Place
from lora_merge.core.plan import Step
from lora_merge.core.tensor import TensorRecord

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


class Sized(Protocol):
    """Work with a known size: the bytes that it writes or reads."""

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""


Work = TypeVar("Work", bound=Sized)
Result = TypeVar("Result")
Work_contra = TypeVar("Work_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class WorkerSpec(Protocol[Work_contra, Result_co]):
    """What workers are made from: frozen, and picklable for the executors that start processes."""

    def make(self, n: int) -> contextlib.AbstractContextManager[Sequence[Callable[[Work_contra], Result_co]]]:
        """Make the workers of one process; leaving the context ends them.

        They are made together because they share what threads of one process can share: factors that several of them
        need, and torch's number of threads.

        Args:
            n: how many; each is called by one thread only.
        """


@dataclass(frozen=True, slots=True)
class Plain(Generic[Work, Result]):
    """The spec of workers that keep nothing between two pieces: a function.

    Args:
        do: does one piece. It is called from several threads; for processes it has to be a function of a module.
    """

    do: Callable[[Work], Result]

    @contextlib.contextmanager
    def make(self, n: int) -> Iterator[Sequence[Callable[[Work], Result]]]:
        """Yield the function, once for each worker."""
        yield [self.do] * n


@dataclass(frozen=True, slots=True)
class Piece:
    """Steps that read the same bytes, for one output or several: what a worker gets.

    Either a run of copies whose bytes are adjacent, or one stored tensor that becomes a tensor of each output.
    """

    wanted: tuple[tuple[int, tuple[Step, ...]], ...]
    """The number of an output, and its steps: of a run all copies in order, of a merge the one step."""

    @property
    def nbytes(self) -> int:
        """Bytes that are written, in all outputs together."""
        return sum(step.nbytes for _, steps in self.wanted for step in steps)


@dataclass(frozen=True, slots=True)
class Done:
    """What a worker gives back for a piece."""

    records: tuple[tuple[int, TensorRecord], ...]
    """The number of an output, and the evidence of one of its tensors."""

    busy: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the worker spent on each stage."""

    readings: Mapping[Place, str] = field(default_factory=dict)
    """The digest of each place of an input that was read on the way, for the driver to compare and to keep."""


def largest_first(pieces: Iterable[Work]) -> list[Work]:
    """Return pieces in descending order of their bytes."""
    # A large piece that starts last would keep one worker busy while all others have nothing left to do.
    return sorted(pieces, key=lambda piece: piece.nbytes, reverse=True)
