"""Kills at random moments and full disks: no broken output, nothing lost, and what is run again ends in the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from tests.faults.test_table import can_mount
from tests.faults.trial import Job
from tests.tampering import edit_tensors, to_pickles

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("LORA_MERGE_KILLS", "15"))
"""Of all jobs together."""

N_DISKS = int(os.environ.get("LORA_MERGE_DISKS", "10"))
"""Of all jobs together."""

MODELS = {
    "one file": ("llama", "bfloat16", None, ()),
    "shards": ("qwen2", "bfloat16", "60KB", ("--workers", "2")),
    "tied, cast, shards of another size": ("llama_tied", "float32", None, ("--dtype", "float16", "--max-shard-size", "50KB")),
    "Conv1D, over an old output": ("gpt2", "float32", "100KB", ("--verify", "full")),
    "pickled": ("llama", "float16", "60KB", ("--workers", "3")),
}  # fmt: skip
SHARES = {
    **dict.fromkeys(MODELS, 0.14),
    "a batch of one base, over old outputs": 0.1,
    "a batch in two processes": 0.02,
    "a conversion": 0.06,
    "an extraction": 0.04,
    "a merge that is resumed": 0.08,
}
"""Of all kills."""


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def job(pico, pico_adapter, tampered, tmp_path, work):
    """Return a function: the name of a job → the job."""

    def merge(name):
        family, dtype, max_shard_size, options = MODELS[name]
        base = pico(family, dtype, max_shard_size)
        fields = {"target_modules": ["c_attn", "c_proj"]} if family == "gpt2" else {"use_rslora": True}
        adapter = pico_adapter(base, **fields)
        if name == "pickled":
            base = tampered(base, "pickled")
            to_pickles(base)
        arguments = ["--base", str(base), "--adapter", str(adapter), "--out", "{work}/out", *options]
        old = str(base) if "old" in name else None
        return Job([*arguments, *(["--overwrite"] if old else [])], ["out"], old, ["--resume"])

    def batch(n_bases, *options):
        base = pico("llama", "bfloat16", "60KB")
        bases = [tampered(base, f"base-{n}") for n in range(n_bases)]
        outs = [f"{n}-{rank}" for n in range(n_bases) for rank in (2, 4)]
        jobs = [
            {"base": str(bases[int(out[0])]), "adapter": str(pico_adapter(base, r=int(out[2]))), "out": str(work / out)}
            for out in outs
        ]  # fmt: skip
        path = tmp_path / "batch.yaml"
        path.write_text(yaml.safe_dump({"jobs": jobs}))
        return Job(["batch", str(path), "--json", *options], outs)

    def make(name):
        base = pico("llama", "bfloat16", "60KB")
        match name:
            case "a batch of one base, over old outputs":
                return replace(batch(1, "--overwrite"), old=str(base))
            case "a batch in two processes":
                return replace(batch(2, "--jobs", "2"), has_processes=True)
            case "a conversion":
                arguments = ["convert", str(pico_adapter(base)), "--base", str(base), "--rank", "2"]
                return Job([*arguments, "--out", "{work}/out"], ["out"])
            case "an extraction":
                tuned = tampered(base, "tuned")
                for path in tuned.glob("*.safetensors"):
                    edit_tensors(path, lambda found: [one.add_(0.1) for one in found.values()])
                arguments = ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", "2"]
                return Job([*arguments, "--out", "{work}/out"], ["out"])
            case "a merge that is resumed":
                return replace(merge("shards"), twice=1.0)
        return merge(name)

    return make


def found(
    script: str, job: Job, work: Path, *, before: tuple[str, ...] = (), **more: object
) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*before, sys.executable, "-m", f"tests.faults.{script}", json.dumps({"job": asdict(job), "work": str(work), **more})],
        check=False,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    words = json.loads(done.stdout)
    print(f"{words=}")  # noqa: T201 - for whoever counts
    assert not [word for word in words if word.startswith("broken")], words
    return words


@pytest.mark.parametrize("name", SHARES)
def test_what_is_killed_loses_nothing_and_run_again_it_ends_in_the_same_bytes(name, job, work):
    n = max(1, round(SHARES[name] * N_KILLS))
    told = job(name)

    words = found("killing", told, work, n=n, seed=20_261_126, signal=signal.SIGKILL)

    assert words["resumed"] == n
    assert words["ended"] >= 0.9 * n - 1  # a run may make fewer calls than the one that was counted
    if told.again and n >= 10:
        assert words["from where it stopped"] >= 0.2 * n


@pytest.mark.parametrize("in_two_steps", [False, True], ids=["in one step", "in two steps"])
def test_a_run_that_is_killed_while_it_names_its_output_loses_neither_the_old_nor_the_new(
    in_two_steps, job, work
):
    n = max(4, N_KILLS // 10)
    told = replace(job("Conv1D, over an old output"), n_last=45, in_two_steps=in_two_steps)

    words = found("killing", told, work, n=n, seed=6, signal=signal.SIGKILL)

    assert words["resumed"] == n


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(signum, job, work):
    n = max(3, N_KILLS // 40)

    words = found("killing", job("shards"), work, n=n, seed=7, signal=signum)

    assert words["resumed"] == n
    assert words["from where it stopped"] >= 0.2 * n


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("shards", "a disk"),
        ("Conv1D, over an old output", "a disk"),
        ("a batch of one base, over old outputs", "a disk"),
        ("a conversion", "a disk"),
        ("a batch of one base, over old outputs", "a limit"),
    ],
)
def test_what_finds_no_room_loses_nothing_and_with_room_it_ends_in_the_same_bytes(name, kind, job, work):
    is_mounted = kind == "a disk" and can_mount()
    before = ("unshare", "-m") if is_mounted else ()
    n = max(2, N_DISKS // 5)

    words = found("filling", job(name), work, before=before, n=n, mount=is_mounted)

    assert words["resumed"] == n
    assert words["full"] >= n // 2
