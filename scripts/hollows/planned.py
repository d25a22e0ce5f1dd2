"""Dry runs of merges into hollow checkpoints, measured: what a plan costs, and what it says of the output."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import ROOT, lora_merge
from benchmarks.measure import RunError, timed

from hollows.making import make_adapter, make_base
from hollows.models import Targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.measure import Sample

    from hollows.models import Model

STORAGES = ("base", "mixed", "dense")
"""Values of ``--out-storage``."""

RANKS: dict[Targets, int] = {"attention": 8, "all": 16}
"""Of the adapters."""

TENSORS = ("n_merged", "n_replaced", "n_cast", "n_copied")
BYTES = ("merged_bytes", "replaced_bytes", "cast_bytes", "copied_bytes")


@dataclass(frozen=True, slots=True)
class Place:
    """A model with its adapters on a disk."""

    base: Path
    adapters: dict[Targets, Path]


def environment() -> dict[str, str]:
    """Return the variables with which the command is this checkout's, even where another one is installed."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}


def hollow(model: Model, root: Path, targets: Sequence[Targets] = ("attention", "all")) -> Place:
    """Make a hollow model with its adapters in a directory, again if they are there."""
    shutil.rmtree(root, ignore_errors=True)
    place = Place(root / "base", {one: root / one for one in targets})
    make_base(model, place.base)
    for one, directory in place.adapters.items():
        make_adapter(model, one, RANKS[one], directory)
    return place


def rows(model: Model, root: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for every adapter and storage of the output; every command is a fresh process."""
    place = hollow(model, root)
    stored = [tensor.nbytes for tensor in model.tensors()]
    about = {
        "model": model.name, "stored": model.storage, "tensors": len(stored), "files": len(model.files),
        "nbytes": sum(stored), "disk_bytes": sum(path.stat().st_blocks * 512 for path in place.base.iterdir()),
    }  # fmt: skip
    for targets, adapter in place.adapters.items():
        for storage in STORAGES:
            sample, summary = dry_run(place.base, adapter, root, storage)
            yield {
                **about, "adapter": targets, "rank": RANKS[targets], "out_storage": storage,
                "merged": summary["n_merged"], "out_tensors": sum(summary[name] for name in TENSORS),
                "out_files": summary["n_shards"], "out_bytes": sum(summary[name] for name in BYTES),
                "copied_bytes": summary["copied_bytes"], "wall_s": sample.wall_s, "cpu_s": sample.cpu_s,
                "peak_bytes": sample.peak_rss_bytes,
            }  # fmt: skip
    shutil.rmtree(root)


def dry_run(base: Path, adapter: Path, work: Path, storage: str) -> tuple[Sample, dict[str, Any]]:
    """Return what a dry run took, and the summary of its plan.

    Raises:
        RunError: it fails.
    """
    log = work / "log"
    command = [
        *lora_merge(), "--base", str(base), "--adapter", str(adapter), "--out", str(work / "out"),
        "--out-storage", storage, "--dry-run", "--json",
    ]  # fmt: skip
    sample = timed(command, out=work / "out", log=log, environment=environment())
    summary = json.loads(log.read_text())["summary"]
    if (work / "out").exists():
        raise RunError("a dry run has made its output")
    return sample, summary
