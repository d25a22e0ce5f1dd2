"""Merges from a bucket into a bucket against plain copies of the base, on a server on this machine; all take turns."""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import Case
from benchmarks.inputs import adapter_place, base_place, ensure
from benchmarks.machine import ROOT, lora_merge, nbytes_in, usable_cores
from benchmarks.measure import RunError, files_in, settle, timed
from benchmarks.plain_copy import LIBRARIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.measure import Sample

BASE, OUT = "base", "out"
VOLUMES = 400
"""Of SeaweedFS, 256 MB each: it keeps what was deleted for a while."""

COPIES = ("stream", "store")
"""Values of ``--copies``."""

Round = dict[str, "Sample"]
"""Name of a side → what its command took."""


@dataclass(frozen=True, slots=True)
class Server:
    """A bucket on a running server."""

    endpoint: str
    bucket: str
    client: Any
    """boto3's."""

    def url(self, folder: str) -> str:
        """Return the text of a folder."""
        return f"s3://{self.bucket}/{folder}"

    def objects(self, folder: str) -> dict[str, int]:
        """Return the size in bytes of each object in a folder."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=f"{folder}/")
        found = (one for page in pages for one in page.get("Contents", ()))
        return {one["Key"].removeprefix(f"{folder}/"): one["Size"] for one in found}

    def weights(self, folder: str) -> dict[str, tuple[int, str]]:
        """Return size and CRC64NVME, as the server states it, of each weight file in a folder."""
        head = partial(self.client.head_object, Bucket=self.bucket, ChecksumMode="ENABLED")
        return {
            name: (nbytes, head(Key=f"{folder}/{name}").get("ChecksumCRC64NVME", ""))
            for name, nbytes in self.objects(folder).items()
            if name.endswith(".safetensors")
        }

    def fill(self, folder: str, directory: Path) -> None:
        """Put the files of a directory into a folder."""
        for path in files_in([directory]):
            key = f"{folder}/{path.relative_to(directory).as_posix()}"
            self.client.upload_file(str(path), self.bucket, key)

    def clear(self, folder: str) -> None:
        """Delete a folder."""
        for name in self.objects(folder):
            self.client.delete_object(Bucket=self.bucket, Key=f"{folder}/{name}")


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Server]:
    """Run SeaweedFS in a directory, which is removed afterwards; this process and its children are set up for it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from tests.stores import conftest, servers

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    before = dict(os.environ)
    try:
        with servers.seaweed(root, conftest.KEY_ID, conftest.SECRET, VOLUMES) as endpoint:
            os.environ.update(conftest.environment_of(endpoint))
            client = conftest.client(endpoint)
            conftest.made_within(30, lambda: client.create_bucket(Bucket=conftest.BUCKET))
            yield Server(endpoint, conftest.BUCKET, client)
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(root, ignore_errors=True)


def sides(server: Server, adapter: Path) -> dict[str, list[str]]:
    """Return the commands that take turns, by name."""
    program = [sys.executable, str(Path(__file__).with_name("plain_copy.py"))]
    source, target = server.url(BASE), server.url(OUT)
    copies = {f"copy by {library}": [*program, library, source, target] for library in LIBRARIES}
    merge = [*lora_merge(), "--base", source, "--adapter", str(adapter), "--out", target, "--json", "--quiet"]
    return copies | {f"merge, {how}": [*merge, "--copies", how] for how in COPIES}


def rounds_of(
    cache: Path, size_gb: float, n_rounds: int, settle_s: float, *, merges_only: bool
) -> Iterator[str]:
    """Yield a line about each round, then medians, ratios, and the bytes that travelled. Every command is a fresh process.

    Args:
        cache: for inputs, and for what the server keeps.
        size_gb: of the base, in 10⁹ bytes.
        n_rounds: turns of each.
        settle_s: seconds of rest before each command.
        merges_only: without the copies.

    Raises:
        RunError: a command fails, or outputs are not what they must be.
    """
    case = Case(size_gb, "bfloat16", "attention", 16)
    base, adapter = base_place(cache, case), adapter_place(cache, case, "lora")
    ensure([base, adapter])
    nbytes = nbytes_in(base.directory)
    with serving(cache / "server") as server:
        server.fill(BASE, base.directory)
        commands = sides(server, adapter.directory)
        if merges_only:
            commands = {name: command for name, command in commands.items() if name.startswith("merge")}
        found: list[Round] = []
        for n in range(1, n_rounds + 1):
            names = list(commands) if n % 2 else list(commands)[::-1]
            found.append(one_round(server, {name: commands[name] for name in names}, cache / OUT, settle_s))
            told = (
                f"{name} {sample.wall_s:.2f} s ({sample.peak_rss_bytes / 1e6:.0f} MB)"
                for name, sample in found[-1].items()
            )
            yield f"round {n}: {'; '.join(told)}"
        yield from summary(found, nbytes, list(commands))
        for how in COPIES:
            sent, received = travelled(server, commands[f"merge, {how}"], cache / OUT)
            yield (
                f"merge, {how}: {received / 1e6:.0f} MB came from the store and {sent / 1e6:.0f} MB went to it; "
                f"the base has {nbytes / 1e6:.0f} MB"
            )


def one_round(server: Server, commands: dict[str, list[str]], scratch: Path, settle_s: float) -> Round:
    """Run each command once, and compare what they wrote.

    Raises:
        RunError: one fails, or wrote something else than it must.
    """
    found: Round = {}
    outputs: dict[str, dict[str, tuple[int, str]]] = {}
    for name, command in commands.items():
        server.clear(OUT)
        settle(settle_s, scratch)
        scratch.mkdir(parents=True)
        # Our source first: another checkout may be installed.
        environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        found[name] = timed(command, out=scratch / OUT, log=scratch / "log", environment=environment)
        outputs[name] = server.weights(OUT)
    server.clear(OUT)
    shutil.rmtree(scratch, ignore_errors=True)
    check(server, outputs)
    return found


def check(server: Server, outputs: dict[str, dict[str, tuple[int, str]]]) -> None:
    """Raise where merges differ from each other, or copies in size from the base."""
    merged = [files for name, files in outputs.items() if name.startswith("merge")]
    if any(files != merged[0] or not all(crc for _, crc in files.values()) for files in merged):
        raise RunError("the server states other checksums of one merge than of the other, or none")
    wanted = {name: nbytes for name, (nbytes, _) in server.weights(BASE).items()}
    for name, files in outputs.items():
        if name.startswith("copy") and {file: nbytes for file, (nbytes, _) in files.items()} != wanted:
            raise RunError(f"{name} has files of other names or sizes than the base")


def summary(found: list[Round], nbytes: int, names: list[str]) -> Iterator[str]:
    """Yield medians of each side, and how fast merges are against copies, round by round."""
    for name in names:
        samples = [one[name] for one in found]
        moved = [_moving_s(sample) for sample in samples]
        yield (
            f"{name}: {_median(sample.wall_s for sample in samples):.2f} s, {_median(moved):.2f} s of them for the weights; "
            f"{_median(sample.cpu_s for sample in samples) / nbytes * 1e9:.1f} CPU s/GB; "
            f"{max(sample.peak_rss_bytes for sample in samples) / 1e6:.0f} MB"
        )
    for merge in (name for name in names if name.startswith("merge")):
        for copy in (name for name in names if name.startswith("copy")):
            whole = _spread([one[copy].wall_s / one[merge].wall_s for one in found])
            weights = _spread([one[copy].wall_s / _moving_s(one[merge]) for one in found])
            yield f"speed of {merge} against {copy}: {whole} of the whole command, {weights} of the weights alone"
    yield f"medians of {len(found)} rounds, {usable_cores()} cores that the server shares"


def travelled(server: Server, command: list[str], scratch: Path) -> tuple[int, int]:
    """Return the bytes of bodies that a command sent to the server and received from it."""
    from tests.stores.faulty import Faults, failing

    server.clear(OUT)
    scratch.mkdir(parents=True, exist_ok=True)
    seen = Faults()
    with failing(server.endpoint, seen) as url:
        environment = {"AWS_ENDPOINT_URL": url, "PYTHONPATH": str(ROOT)}
        timed(command, out=scratch / OUT, log=scratch / "log", environment=environment)
    server.clear(OUT)
    return seen.sent_bytes, seen.received_bytes


def _moving_s(sample: Sample) -> float:
    """Return the seconds of copying and merging, without start-up and verification; of a plain copy all."""
    return sample.wall_s if sample.merge_phase_s is None else sample.merge_phase_s


def _spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} × (from {min(ratios):.2f} to {max(ratios):.2f})"


_median: Callable[..., float] = statistics.median
