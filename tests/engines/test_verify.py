"""``lora-merge verify --engine vllm``: the real command asks the real engine."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.engines.families import PLAIN
from tests.tampering import edit_tensors

pytestmark = pytest.mark.engines

NAME = "model.layers.1.mlp.down_proj.weight"


def verified(cli, out, python):
    """Return the exit code, and what each check came to."""
    result = cli("verify", out, "--engine", "vllm", "--engine-python", python, "--json")
    proof = json.loads(result.stdout)
    return result.exit_code, {found["check"]: found for found in proof["findings"]}, proof["comparisons"]


def test_vllm_says_what_base_and_adapter_say(prepared, engines_python, cli):
    code, findings, comparisons = verified(cli, prepared[PLAIN.name].merged, engines_python)
    assert code == 0, findings
    assert findings["vllm"]["state"] == findings["forward"]["state"] == "passed"
    by_vllm = [one for one in comparisons if one["engine"].startswith("vLLM 0.")]
    assert by_vllm
    assert all(one["first_diverging"] is None and one["n_tokens"] == 8 for one in by_vllm)


def test_vllm_says_something_else_where_a_module_is_not_merged(prepared, engines_python, cli, tmp_path):
    about = prepared[PLAIN.name]
    out = tmp_path / "out"
    shutil.copytree(about.merged, out)
    from safetensors.torch import load_file

    before = load_file(about.base / "model.safetensors")[NAME]
    edit_tensors(out / "model.safetensors", lambda tensors: tensors.update({NAME: before}))
    code, findings, comparisons = verified(cli, out, engines_python)
    assert code == 6
    assert findings["vllm"]["state"] == "failed"
    assert not any(one["ok"] for one in comparisons if one["engine"].startswith("vLLM"))


def test_a_checkpoint_that_vllm_refuses_is_a_failure_with_its_reason(prepared, engines_python, cli, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(prepared[PLAIN.name].merged, out)
    edit_tensors(
        out / "model.safetensors", lambda tensors: tensors.update({"unheard.of": tensors[NAME].clone()})
    )
    code, findings, _ = verified(cli, out, engines_python)
    assert code == 6
    assert findings["vllm"]["state"] == "failed"
    assert "cannot run the merged checkpoint" in findings["vllm"]["issues"][0]["sentence"]
