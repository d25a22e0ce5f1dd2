"""Merged tensors, looked at while torch is loaded: one reading of base and output tells digest, finiteness and projections."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lora_merge.checks.coded_rows import CodedRows
from lora_merge.checks.expecting import is_plain_sum
from lora_merge.checks.plain_rows import PlainRows
from lora_merge.checks.projecting import needs_no_torch, read_once
from lora_merge.checks.projection import Projection
from lora_merge.core.plan import Merge
from lora_merge.core.weight import WEIGHT
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.runtime.torch_threads import one_torch_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.executors.crew import Crew
    from lora_merge.formats.written_checkpoint import Output

    Rows = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one reading told of a merged tensor."""

    ref: TensorRef
    """Where it is."""

    digest: str
    finite: bool
    found: Projection | Rows | None
    """The suspect rows; or what they will be found in once torch is loaded, where that is needed."""

    def suspects(self) -> Rows | None:
        """Return the rows that projections suspect; None where they cannot tell. To be called once torch is loaded."""
        return self.found.suspects() if isinstance(self.found, Projection) else self.found


@dataclass(slots=True)
class Digests:
    """Returns the digests of tensors. Each tensor is read once, however many checks ask."""

    _known: dict[TensorRef, str] = field(default_factory=dict)

    def __call__(self, ref: TensorRef) -> str:
        """Return the digest of a tensor's bytes.

        Raises:
            CheckpointError: its file cannot be read.
        """
        if ref not in self._known:
            self._known[ref] = tensor_digest(ref)
        return self._known[ref]

    def take(self, seen: Seen) -> None:
        """Take over the digest of a tensor that was read."""
        self._known[seen.ref] = seen.digest


def asks_torch(steps: Iterable[Step]) -> bool:
    """Return whether torch is needed to verify what some steps made, if all is right."""
    return any(isinstance(step.op, Merge) and not _is_settled(step) for step in steps)


def _is_settled(step: Step) -> bool:
    """Return whether a merge can be verified without torch, if all is right."""
    assert isinstance(step.op, Merge)
    if CodedRows.applies(step.op):
        return True
    return PlainRows.applies(step.op) and needs_no_torch(step) and is_plain_sum(step.op)


def look(
    steps: Sequence[Step], output: Output, crew: Crew, has_torch: Callable[[], bool]
) -> Mapping[str, Seen]:
    """Return what was seen of merged tensors, by the name of the step. Those for which torch is needed are left out.

    Args:
        steps: with the places of the output as it is now.
        output: the output.
        crew: the threads that read.
        has_torch: whether torch is loaded by now. From then on no projections are kept: they are some bytes a row.

    Raises:
        CheckpointError: a file cannot be read.
    """
    wanted = [step for step in steps if needs_no_torch(step)]
    return dict(crew.each(_looking(output, has_torch), wanted))


def _looking(output: Output, has_torch: Callable[[], bool]) -> Callable[[Step], Iterator[tuple[str, Seen]]]:
    def seen(step: Step) -> Iterator[tuple[str, Seen]]:
        slot = step.writes[WEIGHT]
        ref = replace(slot, file=output.file_of(slot.file))
        digest, finite, projection = read_once(step, WEIGHT, ref)
        assert projection is not None
        assert isinstance(step.op, Merge)
        found: Projection | Rows | None = projection
        if is_plain_sum(step.op):
            found = projection.suspects()
        elif has_torch():
            with one_torch_thread():
                found = projection.suspects()
        yield step.name, Seen(ref, digest, finite, found)

    return seen
