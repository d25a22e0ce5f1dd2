"""An adapter of a model of another size: one line says so, what follows is short, and --json has all of it."""

from __future__ import annotations

import json

import pytest

from lora_merge.cli import exits
from tests.conftest import COMMON
from tests.tampering import edit_json


def small(root, **sizes):
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**COMMON, **sizes}))
    model.save_pretrained(root)
    return root


WIDE = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"num_hidden_layers": 1}, "2 layers, hidden size 64; this base has 1 layer, hidden size 64"),
        ({**WIDE, "num_hidden_layers": 1}, "2 layers, hidden size 64; this base has 1 layer, hidden size 32"),
        (WIDE, "2 layers, hidden size 64; this base has 2 layers, hidden size 32"),
        ({"num_hidden_layers": 5}, "2 layers, hidden size 64; this base has 5 layers, hidden size 64"),
    ],
)  # fmt: skip
def test_one_line_says_what_was_trained_on_and_what_this_is(
    sizes, says, pico, pico_adapter, tampered, cli, tmp_path
):
    base = small(tmp_path / "base", **sizes)
    adapter = tampered(
        pico_adapter(pico(), target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]), "adapter"
    )
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="acme/solid")

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")
    issues = json.loads(result.stdout)["issues"]
    verbose = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "-v")

    assert result.exit_code == exits.PLAN, result.stderr
    assert (
        f"was trained on {says}\nhint: merge into the base that the adapter was trained on: it names acme/solid"
        in result.stderr
    )
    assert f"  {len(issues) - 1} problems follow from it:" in result.stderr
    assert sum(line.startswith("error: ") for line in result.stderr.splitlines()) == 1
    assert len(result.stderr.splitlines()) <= 11
    assert issues[0]["code"] == "other-size"
    assert sum(line.startswith("error: ") for line in verbose.stderr.splitlines()) == len(issues) + 1


def test_a_fault_of_some_modules_is_not_laid_to_the_base(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()), "adapter")
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "down_proj", "v_proj", "k_proj"])

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "was trained on" not in result.stderr


def test_inspect_says_it_first_and_shortly_too(pico, pico_adapter, cli, tmp_path):
    base = small(tmp_path / "base", num_hidden_layers=1)
    adapter = pico_adapter(pico(), target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])

    result = cli("inspect", adapter, "--base", base)

    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "was trained on 2 layers" in errors[0]
    assert len(errors) <= 4
