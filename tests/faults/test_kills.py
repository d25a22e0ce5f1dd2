"""Two hundred kills at random moments: no broken output, and every resumed run is, byte for byte, an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tampering import to_pickles

KILLING = Path(__file__).with_name("killing.py")
N_KILLS = int(os.environ.get("LORA_MERGE_KILLS", "40"))
"""Of each model; there are five."""

MODELS = {
    "one file": ("llama", "bfloat16", None, ()),
    "shards": ("qwen2", "bfloat16", "60KB", ("--workers", "2")),
    "tied, cast, shards of another size": ("llama_tied", "float32", None, ("--dtype", "float16", "--max-shard-size", "50KB")),
    "Conv1D, over an old output": ("gpt2", "float32", "100KB", ("--verify", "full")),
    "pickled": ("llama", "float16", "60KB", ("--workers", "3")),
}  # fmt: skip


@pytest.fixture
def job(pico, pico_adapter, tampered, tmp_path, request):
    """Return a function: the name of a model → what `killing` is told, but for how often and by what."""

    def make(name: str) -> dict:
        family, dtype, max_shard_size, options = MODELS[name]
        base = pico(family, dtype, max_shard_size)
        fields = {"target_modules": ["c_attn", "c_proj"]} if family == "gpt2" else {"use_rslora": True}
        adapter = pico_adapter(base, **fields)
        if name == "pickled":
            base = tampered(base, "pickled")
            to_pickles(base)
        work = tmp_path / "work"
        work.mkdir()
        old = str(base) if "old" in name else None
        return {
            "arguments": ["--base", str(base), "--adapter", str(adapter), *options], "work": str(work), "old": old
        }  # fmt: skip

    return make


def found(job: dict, **more: int) -> dict[str, int]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, KILLING, json.dumps({**job, **more})],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", MODELS)
def test_a_killed_run_loses_nothing_and_is_resumed_to_the_same_bytes(name, job):
    words = found(job(name), n=N_KILLS, seed=20_261_126, signal=signal.SIGKILL)

    assert not [word for word in words if word.startswith("broken")], words
    assert words["resumed"] == N_KILLS
    assert words["ended"] >= 0.9 * N_KILLS  # a run may make fewer calls than the one that was counted
    assert words["from where it stopped"] >= 0.2 * N_KILLS


@pytest.mark.parametrize("in_two_steps", [False, True], ids=["in one step", "in two steps"])
def test_a_run_that_is_killed_while_it_names_its_output_loses_neither_the_old_nor_the_new(in_two_steps, job):
    n = max(10, N_KILLS // 4)
    words = found(
        job("Conv1D, over an old output"),
        n=n, seed=6, signal=signal.SIGKILL, n_last=45, in_two_steps=in_two_steps,
    )  # fmt: skip

    assert not [word for word in words if word.startswith("broken")], words
    assert words["resumed"] == n


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(signum, job):
    n = max(5, N_KILLS // 4)
    words = found(job("shards"), n=n, seed=7, signal=signum)

    assert not [word for word in words if word.startswith("broken")], words
    assert words["resumed"] == n
    assert words["from where it stopped"] >= 0.2 * n
