"""What every check is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lora_merge.core.plan import MergePlan
from lora_merge.core.tensor import TensorRecord


@dataclass(frozen=True, slots=True)
class Evidence:
    """The plan, what was written, and the records that writing left behind."""

    plan: MergePlan
    root: Path
    """The directory to look at: staging, before the rename."""

    records: tuple[TensorRecord, ...]
    level: Literal["sample", "full"]
