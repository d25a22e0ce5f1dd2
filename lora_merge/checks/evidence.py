"""What every check gets: plan, directory, records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.core.plan import Merge, MergePlan
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.executors.crew import ALONE, Crew
from lora_merge.formats.safetensors import tensor_digest
from lora_merge.formats.weight_files import place_of
from lora_merge.formats.written_checkpoint import read_output

if TYPE_CHECKING:
    from lora_merge.formats.written_checkpoint import Output


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Weight files that are in another storage than the small files of their output."""

    weights: str = ""
    """Where they are (``scheme://…/folder``); empty where they are with the small files."""

    stored: frozenset[str] = frozenset()
    """Names of the files that are there."""

    compared: frozenset[str] = frozenset()
    """Those whose bytes the storage has compared with what was sent; they are read at level ``full`` only."""


HERE = Elsewhere()


@dataclass(frozen=True)
class Evidence:
    """The plan, the written files, and the records that writing returned."""

    plan: MergePlan
    root: Path
    """The directory to look at: staging, before it is published."""

    records: tuple[TensorRecord, ...]
    level: Literal["sample", "full"]
    sealed: Mapping[str, str] = field(default_factory=dict)
    """File name → digest of what was meant to be written, for the files around the weights."""

    digest: Callable[[TensorRef], str] = tensor_digest
    """Returns the digest of a tensor's bytes on the disk."""

    elsewhere: Elsewhere = HERE
    """Where the weight files are, if not in `root`."""

    crew: Crew = ALONE
    """The threads that look at tensors."""

    def file_of(self, name: str) -> str:
        """Return the text that names a weight file of the output."""
        return place_of(self.root, self.elsewhere.weights, name)

    def stored_at(self, writes: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
        """Return the slots of a step, by role, as tensors that can be read."""
        return {role: replace(slot, file=self.file_of(slot.file)) for role, slot in writes.items()}

    @cached_property
    def slots(self) -> dict[str, TensorRef]:
        """The place of every tensor that the plan writes, by its name."""
        return {slot.name: slot for step in self.plan.steps for slot in step.slots}

    @property
    def n_projected(self) -> int:
        """The number of rows of merged tensors that projections have checked."""
        seen = {record.name for record in self.records if record.suspects is not None}
        merges = [step for step in self.plan.steps if isinstance(step.op, Merge)]
        return sum(
            step.op.view.n_rows for step in merges if isinstance(step.op, Merge) and step.main.name in seen
        )

    @cached_property
    def output(self) -> Output:
        """The directory's headers and small files, read once."""
        return read_output(self.root, self.elsewhere.weights, self.elsewhere.stored)
