"""What a merge would change of a weight, without an output: the change itself, or how large it is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.plan import Copy, Merge, Step, View
from lora_merge.core.tensor import nbytes_of
from lora_merge.io.input_files import tell_digest
from lora_merge.io.safetensors import load
from lora_merge.merge import Merger
from lora_merge.writers import InMemory, Norms

if TYPE_CHECKING:
    import torch

    from lora_merge.core.tensor import TensorRef


def merged_in_float32(step: Step) -> torch.Tensor:
    """Return W′ of a stored tensor, in its shape, as it is before it is rounded to what it is stored as.

    Raises:
        CheckpointError: a source cannot be read.
    """
    wide = _wide(step)
    (slot,) = wide.slots
    sink = InMemory(slot.nbytes)
    record = Merger(sink, "cpu", is_checked=False)(wide)
    assert isinstance(wide.op, Merge)
    tell_digest(wide.op.parts[0], record.source)
    return sink.tensor(slot.shape)


def change_of(step: Step) -> torch.Tensor:
    """Return W′ - W of a stored tensor, float32, in its shape; nothing is rounded to what it is stored as.

    Raises:
        CheckpointError: a source cannot be read.
    """
    assert isinstance(step.op, Merge)
    return merged_in_float32(step).sub_(load(step.op.parts[0]).float())


def norms_of(step: Step, before: TensorRef) -> tuple[float, float]:
    """Return ‖W‖ and ‖W′ - W‖ of a stored tensor, in the Frobenius norm, read tile by tile.

    Args:
        step: of the plan.
        before: the base's own tensor, which another of the same shape may take the place of.

    Raises:
        CheckpointError: a source cannot be read.
    """
    norms = Norms(before)
    Merger(norms, "cpu", is_checked=False)(_wide(step))
    return norms.weight, norms.delta


def _wide(step: Step) -> Step:
    """Return a step that makes the same tensor in float32."""
    (slot,) = step.slots
    wide = replace(slot, dtype="F32", start=0, nbytes=nbytes_of("F32", slot.shape))
    op = step.op
    if isinstance(op, Copy):
        op = Merge("dense", (op.source,), (), View.of(slot.shape))
    return Step((wide,), op, step.replaced)
