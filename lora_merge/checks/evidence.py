"""What every check is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_merge.core.plan import MergePlan
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.io.output import read_output
from lora_merge.io.safetensors import tensor_digest

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
    digest: Callable[[TensorRef], str] = tensor_digest
    """Reads a tensor's bytes."""

    @cached_property
    def output(self) -> Output:
        """Return what is in the directory; it is read once."""
        return read_output(self.root)
