"""The weights of plans, written into directories without a driver: no staging, no journal, no verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.identity import Inputs
from lora_merge.executors import EXECUTORS
from lora_merge.merging import filling
from lora_merge.merging.worker import CopySpec, MergeSpec
from lora_merge.storage.folder import Folder
from lora_merge.storage.local_output import FolderSink
from lora_merge.storage.output_files import reserve

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRecord


def fill(
    plan: MergePlan,
    root: Path,
    executor: str = "serial",
    n_workers: int = 1,
    tile_elements: int | None = None,
) -> list[TensorRecord]:
    """Make a directory with the weight files of a plan; return the records in the order of their names."""
    return fill_all({root: plan}, executor, n_workers, tile_elements)[root]


def fill_all(
    plans: Mapping[Path, MergePlan],
    executor: str = "serial",
    n_workers: int = 1,
    tile_elements: int | None = None,
) -> dict[Path, list[TensorRecord]]:
    """Make a directory with the weight files of each plan, all in one run; they may have any bases."""
    sinks = []
    for root, plan in plans.items():
        root.mkdir()
        folder = Folder.of(root)
        for file in plan.files:
            reserve(folder, file)
        sinks.append(FolderSink(folder))
    left = [(number, step) for number, plan in enumerate(plans.values()) for step in plan.steps]
    order, run = filling.Order(list(plans.values())), EXECUTORS[executor]
    copying = CopySpec(tuple(sinks), Inputs())
    merging = MergeSpec(tuple(sinks), Inputs(), tile_elements=tile_elements)
    done = [*run(copying, filling.copies(left, order), n_workers)]
    done += run(merging, filling.merges(left, order), n_workers)
    found: dict[Path, list[TensorRecord]] = {root: [] for root in plans}
    for one in done:
        for number, record in one.records:
            found[list(plans)[number]].append(record)
    return {root: sorted(records, key=lambda record: record.name) for root, records in found.items()}
