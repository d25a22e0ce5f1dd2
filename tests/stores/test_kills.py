"""Kills at random operations of a merge into a store: a configuration beside a whole output only, and the same bytes in the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_merge import api
from tests.faults.trial import content
from tests.stores.merging import Merge

ROOT = Path(__file__).parents[2]
N_KILLS = int(os.environ.get("LORA_MERGE_STORE_KILLS", "12"))
"""Of all jobs together; some runs are killed twice."""

JOBS = {
    "anywhere": (False, 0, ("--workers", "2")),
    "around the configuration": (False, 12, ()),
    "over an old output": (True, 0, ("--workers", "2")),
    "around the configuration, over an old output": (True, 14, ()),
}


@pytest.mark.system
@pytest.mark.parametrize("name", JOBS)
def test_a_killed_merge_leaves_no_half_output_and_goes_on(name, pico, pico_adapter, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    kill(name, str(work), f"file://{work}/out", pico, pico_adapter, tmp_path)


@pytest.mark.system
@pytest.mark.slow
@pytest.mark.loopback
@pytest.mark.parametrize("name", JOBS)
def test_the_same_on_a_real_server(name, seaweed_url, pico, pico_adapter, tmp_path):
    kill(name, str(seaweed_url), seaweed_url.child("out"), pico, pico_adapter, tmp_path)


def kill(name, work, out, pico, pico_adapter, tmp_path):
    """Kill merges of one of `JOBS` in a process of its own, and look at what it found."""
    has_old, n_last, options = JOBS[name]
    base = pico("llama", "bfloat16", "60KB")
    merge = Merge(base, pico_adapter(base), {})
    api.merge(base=str(base), adapter=str(merge.adapter), out=tmp_path / "disk" / "out")
    old = tmp_path / "old"
    if has_old:
        shutil.copytree(base, old)
        (old / "notes.txt").write_text("of the old output")
    told = {
        "work": work,
        "arguments": merge.arguments(out, *options),
        "old": str(old) if has_old else None,
        "whole": content(tmp_path / "disk" / "out"),
        "seed": 1,
        "n_last": n_last,
        "n": -(-N_KILLS // len(JOBS)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.stores.store_killing", json.dumps(told)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{name}: {found}\n")  # -rP shows it
    assert not [word for word in found if word.startswith("broken")], found
    assert found["killed"] >= told["n"] // 2
    assert found["resumed"] == told["n"]
