"""Merges into slices: a few layers of a published model in their real sizes, on a disk, in a store and on Ray."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.buckets import BASE, OUT, serving
from benchmarks.machine import ROOT, lora_merge
from benchmarks.measure import RunError, timed

from hollows.making import make_adapter, make_base
from hollows.planned import BYTES, RANKS, TENSORS, environment

if TYPE_CHECKING:
    from benchmarks.buckets import Server
    from benchmarks.measure import Sample

    from hollows.models import Model, Targets

CASES: tuple[tuple[Targets, str], ...] = (("attention", "base"), ("all", "base"), ("all", "dense"))
"""Adapter and storage of the output."""

PLACES = ("disk", "s3", "ray")
"""Where a merge is made. The first one is what the others are compared with."""

COMPARED = (".safetensors", ".index.json", "config.json")
"""Ends of the names of files that must be the same everywhere: cards and manifests name where their output is."""

CHUNK_BYTES = 16 * 2**20


class Place(Protocol):
    """Where a base is, and where its outputs go."""

    base: str
    out: str
    options: tuple[str, ...]
    """Of the command, beside the usual ones."""

    def digests(self) -> dict[str, str]:
        """Return a digest of each file of the output that is compared."""

    def clear(self) -> None:
        """Remove the output."""


class Disk:
    """A directory, and an executor."""

    def __init__(self, work: Path, *options: str) -> None:
        self._out = work / "out"
        self.base, self.out, self.options = str(work / "base"), str(self._out), options

    def digests(self) -> dict[str, str]:
        """See `Place`."""
        found = {}
        for path in self._out.iterdir():
            if path.name.endswith(COMPARED):
                with path.open("rb") as file:
                    found[path.name] = hashlib.file_digest(file, "blake2b").hexdigest()
        return found

    def clear(self) -> None:
        """See `Place`."""
        shutil.rmtree(self._out, ignore_errors=True)


class Bucket:
    """Two folders of a bucket."""

    def __init__(self, server: Server, work: Path) -> None:
        self._server = server
        server.fill(BASE, work / "base")
        self.base, self.out = server.url(BASE), server.url(OUT)
        self.options: tuple[str, ...] = ()

    def digests(self) -> dict[str, str]:
        """See `Place`."""
        found = {}
        for name in self._server.objects(OUT):
            if name.endswith(COMPARED):
                body = self._server.client.get_object(Bucket=self._server.bucket, Key=f"{OUT}/{name}")["Body"]
                digest = hashlib.blake2b()
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    digest.update(chunk)
                found[name] = digest.hexdigest()
        return found

    def clear(self) -> None:
        """See `Place`."""
        self._server.clear(OUT)


def unusable(place: str) -> str:
    """Return why merges cannot be made in a place; empty where they can."""
    if place == "s3":
        named = os.environ.get("LORA_MERGE_WEED") or ROOT / ".venv-stores" / "bin" / "weed"
        return "" if Path(named).is_file() else "SeaweedFS is not installed: make stores-servers"
    if place == "ray":
        return "" if importlib.util.find_spec("ray") else "the package ray is not installed"
    return ""


def rows(
    model: Model,
    work: Path,
    places: Sequence[str],
    cases: Sequence[tuple[Targets, str]] = CASES,
    server: Server | None = None,
    level: str = "full",
) -> Iterator[dict[str, Any]]:
    """Yield a row for each adapter, storage of the output and place; every command is a fresh process.

    Args:
        model: the slice itself.
        work: a directory for everything; removed in the end.
        places: some of `PLACES`.
        cases: adapters, and storages of the output.
        server: for the store; by default SeaweedFS is started.
        level: of the verification, in the first place; the other outputs have the same bytes.

    Raises:
        RunError: a command fails, or an output differs from the one on the disk.
    """
    shutil.rmtree(work, ignore_errors=True)
    about = {
        "model": model.name,
        "stored": model.storage,
        "nbytes": make_base(model, work / "base", is_hollow=False),
    }
    for targets in dict.fromkeys(targets for targets, _ in cases):
        make_adapter(model, targets, RANKS[targets], work / targets, is_hollow=False)
    with contextlib.ExitStack() as stack:
        lacking = {name: why for name in places if (why := unusable(name)) and not (server and name == "s3")}
        usable = {name: _opened(name, work, stack, server) for name in places if name not in lacking}
        for targets, storage in cases:
            first: dict[str, str] | None = None
            for name, place in usable.items():
                row = _merged(place, work / targets, work, storage)
                if first is None:
                    row |= {"level": level} | _verified(place, work / targets, work, level)
                digests = place.digests()
                place.clear()
                first = first or digests
                if digests != first:
                    other = sorted(file for file in digests | first if digests.get(file) != first.get(file))
                    raise RunError(f"the output in {name} differs: {', '.join(other)}")
                yield about | {"adapter": targets, "out_storage": storage, "place": name} | row
            for name, why in lacking.items():
                yield about | {"adapter": targets, "out_storage": storage, "place": name, "skipped": why}
    shutil.rmtree(work)


def _opened(name: str, work: Path, stack: contextlib.ExitStack, server: Server | None) -> Place:
    if name == "s3":
        return Bucket(server or stack.enter_context(serving(work / "server")), work)
    return Disk(work, *(("--executor", "ray", "--ray-address", "local") if name == "ray" else ()))


def _merged(place: Place, adapter: Path, work: Path, storage: str) -> dict[str, Any]:
    """Merge; return what it took and made."""
    command = [
        *lora_merge(), "--base", place.base, "--adapter", str(adapter), "--out", place.out,
        "--out-storage", storage, *place.options, "--json", "--quiet",
    ]  # fmt: skip
    merge, report = _ran(command, work)
    return {
        "out_bytes": sum(report["summary"][name] for name in BYTES),
        "tensors": sum(report["summary"][name] for name in TENSORS),
        "wall_s": merge.wall_s,
        "cpu_s": merge.cpu_s,
        "peak_bytes": merge.peak_rss_bytes,
    }


def _verified(place: Place, adapter: Path, work: Path, level: str) -> dict[str, Any]:
    """Verify an output; return what it took.

    Raises:
        RunError: it is wrong, or a check could not run.
    """
    inputs = ["--base", place.base, "--adapter", str(adapter)]
    sample, proof = _ran(
        [*lora_merge(), "verify", place.out, *inputs, "--level", level, "--json", "--quiet"], work
    )
    if not proof["ok"] or proof["not_run"]:
        raise RunError(f"the output was not verified: {proof['findings']}, not run: {proof['not_run']}")
    return {"verify_s": sample.wall_s, "verify_cpu_s": sample.cpu_s}


def _ran(command: list[str], work: Path) -> tuple[Sample, dict[str, Any]]:
    log = work / "log"
    sample = timed(command, out=work / "nothing", log=log, environment=environment())
    return sample, json.loads(log.read_text())
