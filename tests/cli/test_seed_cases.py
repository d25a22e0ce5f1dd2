"""The complaints that inspect and convert are there for, each under its own name."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_merge.cli import exits
from tests.tampering import edit_tensors

TOKENS = torch.tensor([[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 11]])

RELATIVE = 1e-5
"""Of the logits' size: sums of up to 80 products in float32, a dozen behind each other, err by less (√80 · 2⁻²⁴ · √12)."""


@pytest.fixture(scope="module")
def base(pico):
    return pico("llama", "float32")


def logits(base, adapter=None):
    """Return what a model computes, with an adapter in PEFT, unmerged."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def assert_same(found, wanted):
    assert (found - wanted).abs().max() <= RELATIVE * wanted.abs().max()


def report(cli, engine, adapter, *options):
    """Return what inspect says of one engine."""
    result = cli("inspect", adapter, "--engine", engine, "--json", *options)
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["engines"]
    return found


def run(cli, command):
    """Run a command as inspect prints it."""
    program, *arguments = shlex.split(command)
    assert program == "lora-merge"
    result = cli(*arguments)
    assert result.exit_code == 0, result.output


def test_rank_32_against_the_16_of_vllm(base, pico_adapter, cli, tmp_path, monkeypatch):
    adapter = pico_adapter(base, r=32, lora_alpha=32, target_modules=["q_proj", "down_proj"])
    monkeypatch.chdir(tmp_path)

    found = report(cli, "vllm", adapter, "--base", base)

    assert found["verdict"] == "with an option"
    (rank,) = found["obstacles"]
    option, convert, merge = rank["cures"]
    assert "rank 32" in rank["sentence"]
    assert option == "vLLM's --max-lora-rank 32"
    assert "--for vllm" in convert
    assert "--rank 16" in convert
    run(cli, convert)
    run(cli, merge)
    converted = tmp_path / f"{adapter.name}-vllm"
    assert json.loads((converted / "adapter_config.json").read_text())["r"] == 16
    assert report(cli, "vllm", converted)["verdict"] == "yes"
    assert_same(logits(tmp_path / f"{adapter.name}-merged"), logits(base, adapter))


def test_rslora_for_an_engine_that_multiplies_by_alpha_over_r(base, pico_adapter, cli, tmp_path):
    adapter = pico_adapter(base, r=8, lora_alpha=16, use_rslora=True)
    assert cli("convert", adapter, "--bake-scale", "--out", tmp_path / "out").exit_code == 0

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name in (name for name in tensors if name.endswith("lora_A.weight")):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b, a = tensors[name.replace("lora_A", "lora_B")], tensors[name]
            weights[f"{module}.weight"] += config["lora_alpha"] / config["r"] * (b @ a)
        found = model.eval()(input_ids=TOKENS).logits

    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert_same(found, logits(base, adapter))


def test_a_regex_of_ms_swift_becomes_the_list_that_lmdeploy_matches(base, pico_adapter, cli, tmp_path):
    regex = r"^(model(?=\.).*\.(q_proj|k_proj|down_proj))$"
    adapter = pico_adapter(base, target_modules=regex)
    assert report(cli, "lmdeploy", adapter)["verdict"] == "no"
    result = cli("convert", adapter, "--for", "lmdeploy", "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    names = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # LMDeploy 0.18: a module is adapted when the last part of its path is an entry of the list, in every layer
    adapted = {
        f"layers.{n}.{path}"
        for n in range(2)
        for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    }
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
    assert {name.split("model.model.model.")[1].rsplit(".", 2)[0] for name in names} == adapted
    assert report(cli, "lmdeploy", tmp_path / "out", "--base", base)["verdict"] == "yes"
    assert_same(logits(base, tmp_path / "out"), logits(base, adapter))


def test_adalora_whose_ranks_never_moved_is_reported(base, cli, tmp_path):
    config = AdaLoraConfig(init_r=6, target_r=3, total_step=100, target_modules=["q_proj", "v_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")

    result = cli("inspect", tmp_path / "adapter", "--json")

    found = json.loads(result.stdout)
    assert found["rank_counts"] == {"6": 4}
    assert [issue["code"] for issue in found["issues"]] == ["adalora-ranks"]
    assert "update_and_allocate" in result.stderr


@pytest.mark.parametrize(
    "command", [["inspect"], ["convert", "--bake-scale", "--out", "out"]], ids=["inspect", "convert"]
)
def test_an_adapter_of_a_pruned_model_is_refused_with_both_shapes(
    command, base, pico_adapter, tampered, cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    adapter = tampered(pico_adapter(base))
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: tensors.update({name: tensors[name][:48].clone()}),
    )

    result = cli(command[0], adapter, *command[1:], "--base", base)

    assert result.exit_code == exits.PLAN
    assert "lora_B is (48, 4), the base needs (64, 4)" in result.stderr
    assert not (tmp_path / "out").exists()


def test_ranks_of_single_layers_survive(base, pico_adapter, cli, tmp_path):
    ranks = {"layers.0.self_attn.q_proj": 2, "layers.1.mlp.down_proj": 7}
    adapter = pico_adapter(base, rank_pattern=ranks, alpha_pattern={"layers.1.mlp.down_proj": 3})
    assert (
        cli("convert", adapter, "--bake-scale", "--expand-targets", "--out", tmp_path / "out").exit_code == 0
    )

    shapes = {
        name: tensor.shape[0]
        for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if "lora_A" in name
    }
    by_layer = {(int(name.split(".")[4]), name.split(".")[6]): rank for name, rank in shapes.items()}
    assert by_layer == {(0, "q_proj"): 2, (1, "q_proj"): 4, (0, "down_proj"): 4, (1, "down_proj"): 7}
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert {module.r["default"] for module in found.modules() if hasattr(module, "lora_A")} == {2, 4, 7}
    assert_same(logits(base, tmp_path / "out"), logits(base, adapter))


def test_a_regex_that_vanilla_peft_refuses_loads_once_it_is_a_list(
    base, pico_adapter, tampered, cli, tmp_path
):
    """ms-swift's regexes for models that see match containers too, which it skips and PEFT does not."""
    adapter = tampered(pico_adapter(base, target_modules=["q_proj", "k_proj"]))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = r"^model\.layers(?!.*(mlp|norm|v_proj|o_proj)).*"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "additional_config.json").write_text(json.dumps({"lora_dtype": None}))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(ValueError, match="is not supported"):
        PeftModel.from_pretrained(model, adapter)

    assert cli("convert", adapter, "--expand-targets", "--out", tmp_path / "out").exit_code == 0

    assert_same(
        logits(base, tmp_path / "out"), logits(base, pico_adapter(base, target_modules=["q_proj", "k_proj"]))
    )


def test_the_config_is_one_that_peft_0_14_reads(base, pico_adapter, cli, tmp_path):
    """Any field that PEFT 0.14 does not know is a TypeError there, and LMDeploy pins that release."""
    from lora_merge.peft_rules.kinds import PEFT_0_14_FIELDS

    adapter = pico_adapter(base)
    assert not json.loads((adapter / "adapter_config.json").read_text()).keys() <= PEFT_0_14_FIELDS
    assert cli("convert", adapter, "--expand-targets", "--out", tmp_path / "out").exit_code == 0

    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.keys() <= PEFT_0_14_FIELDS
    assert LoraConfig(**{name: value for name, value in config.items() if name != "auto_mapping"}).r == 4
