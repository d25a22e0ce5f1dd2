"""A merge that would change nothing is an error, whatever the reason, and the sentence says which it is."""

from __future__ import annotations

import warnings

import pytest

from tests.tampering import edit_json, edit_tensors

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def untrained(pico, pico_adapter, tampered):
    """Return a function (factor, value) → base, and a LoRA in which one factor of every module is that value."""

    def build(factor="lora_B", value=0.0, keep=""):
        base = pico()
        adapter = tampered(pico_adapter(base), f"untrained-{factor}")

        def change(tensors):
            for name, tensor in tensors.items():
                if factor in name and not (keep and keep in name):
                    tensor.fill_(value)

        edit_tensors(adapter / TENSORS, change)
        return base, adapter

    return build


def adapter_of(base, config, out, scale=0.1):
    """Save an adapter of some kind whose trained values are off their beginning by random numbers."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * scale)
        model.save_pretrained(out)
    return out


def refused(cli, base, out, *adapters):
    """Return what the command says of a merge that it refuses, leaving nothing behind."""
    options = [word for adapter in adapters for word in ("--adapter", adapter)]
    result = cli("--base", base, *options, "--out", out)
    assert result.exit_code == 4, result.output
    assert not out.exists()
    return " ".join(result.output.split())


@pytest.mark.parametrize(("factor", "value"), [("lora_B", 0.0), ("lora_B", -0.0), ("lora_A", 0.0)])
def test_an_adapter_whose_every_delta_is_zero_is_refused(factor, value, untrained, cli, tmp_path):
    base, adapter = untrained(factor, value)
    said = refused(cli, base, tmp_path / "out", adapter)
    assert f"{adapter}: has no effect: lora_A or lora_B is all zeros in each of its 4 modules" in said


def test_it_is_refused_beside_one_that_has_an_effect(untrained, pico_adapter, cli, tmp_path):
    base, adapter = untrained()
    assert f"{adapter}: has no effect" in refused(cli, base, tmp_path / "out", pico_adapter(base), adapter)


def test_one_trained_module_is_enough(untrained, cli, tmp_path):
    # Experts and towers that saw no data stay at zero.
    base, adapter = untrained(keep="layers.1.mlp.down_proj")
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out").exit_code == 0


def test_an_untrained_adapter_can_be_inspected(untrained, cli):
    base, adapter = untrained()
    assert cli("inspect", adapter, "--base", base).exit_code == 0


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config", "OFTConfig"])
def test_what_pefts_own_layers_merge_has_to_change_something_too(kind, pico, cli, tmp_path):
    import peft

    fields = {"target_modules": ["q_proj", "down_proj"]}
    fields |= {"feedforward_modules": ["down_proj"]} if kind == "IA3Config" else {}
    fields |= {"oft_block_size": 16} if kind == "OFTConfig" else {}
    base = pico("llama", "float32")
    adapter = adapter_of(base, getattr(peft, kind)(**fields), tmp_path / "adapter", scale=0)
    said = refused(cli, base, tmp_path / "out", adapter)
    assert "the merge changes no value" in said


@pytest.mark.parametrize("options", [(), ("--dtype", "float32")])
@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}], ids=["module", "rows"]
)
def test_whole_parameters_that_equal_the_bases_are_no_change(fields, options, pico, cli, tmp_path):
    from peft import LoraConfig

    base = pico("llama", "bfloat16")
    config = LoraConfig(r=4, target_modules=["q_proj"], **fields)
    adapter = adapter_of(base, config, tmp_path / "adapter", scale=0)
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", *options)
    assert result.exit_code == 4, result.output
    assert "the merge changes no value" in result.output


def test_beft_on_layers_without_a_bias_is_refused(pico, cli, tmp_path):
    from peft import BeftConfig

    base = pico("llama", "float32")
    adapter = adapter_of(base, BeftConfig(target_modules=["v_proj"]), tmp_path / "adapter")
    said = refused(cli, base, tmp_path / "out", adapter)
    assert "layers.0.self_attn.v_proj: BEFT trains a bias, and this module of the base has none" in said


def test_beft_is_refused_where_only_some_layers_have_a_bias(pico, cli, tmp_path):
    # Qwen2 has biases of q, k and v, and none of o.
    from peft import BeftConfig

    base = pico("qwen2", "float32")
    adapter = adapter_of(base, BeftConfig(target_modules=["v_proj", "o_proj"]), tmp_path / "adapter")
    said = refused(cli, base, tmp_path / "out", adapter)
    assert "o_proj: BEFT trains a bias" in said
    assert "v_proj: BEFT" not in said


def test_the_bias_of_lora_b_has_no_place_in_pefts_layers_either(pico, cli, tmp_path):
    # KaSA goes through PEFT's layers, which refuse it in the merge.
    from peft import LoraConfig
    from peft.tuners.lora.config import KasaConfig

    base = pico("llama", "float32")
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, kasa_config=KasaConfig())
    adapter = adapter_of(base, config, tmp_path / "adapter")
    said = refused(cli, base, tmp_path / "out", adapter)
    assert "q_proj: lora_bias trains a bias, and this module of the base has none" in said


def test_what_peft_refuses_to_merge_is_one_sentence(pico, cli, tmp_path, monkeypatch):
    import peft
    from peft.tuners.loha.layer import LoHaLayer

    base = pico("llama", "float32")
    config = peft.LoHaConfig(r=4, target_modules=["q_proj"])
    adapter = adapter_of(base, config, tmp_path / "adapter")

    def no(*_arguments, **_options):
        raise ValueError("not this one\nand more lines")

    monkeypatch.setattr(LoHaLayer, "merge", no)
    said = refused(cli, base, tmp_path / "out", adapter)
    assert "self_attn.q_proj: LOHA: PEFT raises ValueError: not this one" in said
    assert "Traceback" not in said
    assert "and more lines" not in said


def test_a_config_that_scales_by_nothing_is_named_as_the_reason(pico, pico_adapter, tampered, cli, tmp_path):
    base = pico()
    adapter = tampered(pico_adapter(base))
    edit_json(adapter / "adapter_config.json", lora_alpha=0)
    said = refused(cli, base, tmp_path / "out", adapter)
    assert "lora_alpha" in said
    assert "lora_B" not in said
