"""What every check is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.core.plan import Merge, MergePlan
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.formats.written_checkpoint import read_output

if TYPE_CHECKING:
    from lora_merge.core.checkpoint import Output


@dataclass(frozen=True)
class Evidence:
    """The plan, what was written, and the records that writing left behind."""

    plan: MergePlan
    root: Path
    """The directory to look at: staging, before the rename."""

    records: tuple[TensorRecord, ...]
    level: Literal["sample", "full"]
    sealed: Mapping[str, str] = field(default_factory=dict)
    """Digests of the files around the weights, of what was meant to be written to them."""

    digest: Callable[[TensorRef], str] = tensor_digest
    """Reads a tensor's bytes."""

    @property
    def n_projected(self) -> int:
        """Return how many rows of merged tensors were checked by projections."""
        seen = {record.name for record in self.records if record.suspects is not None}
        merges = [step for step in self.plan.steps if isinstance(step.op, Merge)]
        return sum(
            step.op.view.n_rows for step in merges if isinstance(step.op, Merge) and step.main.name in seen
        )

    @cached_property
    def output(self) -> Output:
        """Return what is in the directory; it is read once."""
        return read_output(self.root)
