"""The program that asks vLLM keeps its word on stdout even where there is no vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "lora_merge" / "verification" / "engines" / "vllm_script.py"


def test_without_vllm_every_job_gets_a_line_that_says_so(tmp_path):
    jobs = [{"checkpoint": name, "prompts": [[1, 2]], "n_tokens": 1} for name in ("a", "b")]
    run = subprocess.run(
        [sys.executable, SCRIPT],
        cwd=tmp_path,
        input=json.dumps({"dtype": "float32", "jobs": jobs}),
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["checkpoint"] for line in lines] == ["a", "b"]
    assert all("No module named 'vllm'" in line["error"] for line in lines)


AMX_IS_THERE = "import torch\ntorch.cpu._is_amx_tile_supported = lambda: True\n"
"""Read when Python starts: what a processor with AMX says."""

SAYS_WHAT_IT_SEES = "import torch\nraise RuntimeError(f'AMX: {torch.cpu._is_amx_tile_supported()}')\n"
"""Read in place of vLLM."""


@pytest.mark.parametrize(("dtype", "seen"), [("float32", False), ("bfloat16", True)])
def test_in_float32_vllm_is_kept_from_kernels_that_take_bfloat16_only(tmp_path, dtype, seen):
    (tmp_path / "sitecustomize.py").write_text(AMX_IS_THERE)
    (tmp_path / "vllm.py").write_text(SAYS_WHAT_IT_SEES)
    run = subprocess.run(
        [sys.executable, SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        input=json.dumps({"dtype": dtype, "jobs": [{"checkpoint": "a", "prompts": [[1]], "n_tokens": 1}]}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout)["error"] == f"RuntimeError: AMX: {seen}"
