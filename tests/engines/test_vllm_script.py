"""The program that asks vLLM keeps its word on stdout even where there is no vLLM."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
