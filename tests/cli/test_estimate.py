"""What a plan promises of memory and bytes, beside what the run really takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import lora_merge
from lora_merge.core.plan import Combination, Merge
from lora_merge.merging.estimate import estimate

PROGRAM = (
    "import json, sys, lora_merge; base, adapter, out = sys.argv[1:];"
    "report = lora_merge.merge(base=base, adapter=adapter, out=out, workers=2);"
    "lines = dict(line.split(':', 1) for line in open('/proc/self/status') if ':' in line);"
    "peak = int(lines['VmHWM'].split()[0]) * 1024;"
    "print(json.dumps([report.summary.peak_bytes, peak, report.summary.read_bytes, report.summary.disk_needed_bytes]))"
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the peak of the process")
def test_memory_and_bytes_are_about_those_of_the_run(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16", "40KB")
    adapter = pico_adapter(base)
    out = tmp_path / "out"
    environ = os.environ | {"OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, base, adapter, out],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    )

    peak_wanted, peak, read, written = json.loads(done.stdout)
    # The interpreter with torch is nearly all of it, and its size depends on the build of torch.
    assert 0.6 < peak / peak_wanted < 1.6
    inputs = [*base.glob("*.safetensors"), *adapter.glob("*.safetensors")]
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in inputs)
    assert read == sum(path.stat().st_size for path in inputs) - headers
    # Beside the planned files, an output has a model card and a manifest.
    more = sum((out / name).stat().st_size for name in ("README.md", "merge_manifest.json"))
    found = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert abs(found - more - written) <= 2000


def merges_by(plan, method):
    """Return a plan whose changes are combined by a method."""
    how = Combination(method, 0.5, 0, 16, "x")
    steps = [
        replace(step, op=replace(step.op, combination=how)) if isinstance(step.op, Merge) else step
        for step in plan.steps
    ]
    return replace(plan, steps=tuple(steps))


def test_a_combination_is_estimated_by_what_it_computes(pico, pico_adapter):
    base = pico()
    plan = lora_merge.plan(base=base, adapter=[pico_adapter(base), pico_adapter(base, r=8)])

    def most(one, **how):
        return estimate(one, 1, **how).seconds[1]

    plain = most(plan)
    assert plain < most(merges_by(plan, "dare_linear")) < most(merges_by(plan, "ties"))
    assert most(merges_by(plan, "svd")) > plain
    assert most(plan, is_full=True) > plain
    low, high = estimate(plan, 8).seconds
    assert 0 < low < high
