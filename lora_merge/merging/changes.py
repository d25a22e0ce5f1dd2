"""The change that a merge makes to a weight, without an output: the change itself, or its size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.plan import Merge, Step
from lora_merge.core.tensor import TensorRef, nbytes_of
from lora_merge.core.view import View
from lora_merge.core.weight import FLOAT32, WEIGHT
from lora_merge.formats.weights import values_in_blocks
from lora_merge.merging.memory import InMemory, Norms
from lora_merge.merging.worker import Merger
from lora_merge.storage.input_files import tell_digest

if TYPE_CHECKING:
    import torch

    from lora_merge.core.weight import Weight


def merged_in_float32(step: Step) -> torch.Tensor:
    """Return W′ of one stored weight, float32, in the weight's shape, before it is encoded.

    Raises:
        CheckpointError: a source cannot be read.
    """
    wide = _wide(step)
    sink = InMemory(wide.nbytes)
    (record,) = Merger(sink, "cpu", is_checked=False)(wide)
    # The tile reader leaves what it reads unnoted, because a record has the digest of it. Here the record is
    # dropped, so the digest is noted with the inputs, for the check at the end of the run.
    for role, digest in record.source.items():
        tell_digest(wide.reads[role], digest)
    return sink.tensor(step.shape)


def change_of(step: Step) -> torch.Tensor:
    """Return W′ - W of one stored weight, float32, in the weight's shape; not rounded to the stored dtype.

    Raises:
        CheckpointError: a source cannot be read.
    """
    change = merged_in_float32(step)
    rows = change.view(View.of(step.shape, stacked=True).n_rows, -1)
    # Beside the change, memory holds a block of rows of W at a time.
    for start, (before,) in values_in_blocks(step.source):
        rows[start : start + len(before)].sub_(before)
    return change


def norms_of(step: Step, before: Weight) -> tuple[float, float]:
    """Return the Frobenius norms ‖W‖ and ‖W′ - W‖ of one stored weight; memory is that of one tile.

    Args:
        step: of the plan.
        before: the base's own weight, which another of the same shape may take the place of.

    Raises:
        CheckpointError: a source cannot be read.
    """
    norms = Norms(before)
    Merger(norms, "cpu", is_checked=False)(_wide(step))
    return norms.weight, norms.delta


def _wide(step: Step) -> Step:
    """Return the step with float32 as the storage that is written. The place has no file: `InMemory` and `Norms`
    ignore it.
    """
    shape, op = step.shape, step.op
    place = TensorRef(step.name, FLOAT32.dtype, shape, "", 0, nbytes_of(FLOAT32.dtype, shape))
    if isinstance(op, Merge):
        wide = Merge(op.source, FLOAT32, op.deltas, op.view, op.reach, op.combination)
    else:
        wide = Merge(step.source, FLOAT32, (), View.of(shape))
    return Step(step.name, {WEIGHT: place}, wide, step.replaced)
