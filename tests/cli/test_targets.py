"""Targets as trainers write them, and models that transformers has no class for."""

from __future__ import annotations

import pytest

from lora_merge.cli import exits
from tests.tampering import edit_json

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "regex",
    [
        r"^(model(?=\.layers)).*",
        r"(?!^(visual|aligner))^(model\.layers)(?!.*(lm_head|output|emb|wte|shared)).*",
        r"^(language_model|model\.layers)(?=\.).*\.?(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)?",
    ],
)
def test_a_regex_that_also_matches_container_modules_is_read_as_ms_swift_means_it(
    regex, pico, pico_adapter, tampered, cli, tmp_path
):
    """PEFT itself stumbles over such a regex; ms-swift skips what is no linear layer."""
    listed = pico_adapter(pico(), target_modules=LINEAR)
    swift = tampered(listed, "swift")
    edit_json(swift / "adapter_config.json", target_modules=regex)

    for name, adapter in (("listed", listed), ("swift", swift)):
        result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out" / name, "--strict")
        assert result.exit_code == exits.OK, result.stderr

    one, other = (tmp_path / "out" / name / "model.safetensors" for name in ("listed", "swift"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("shorthand", ["all-linear", "ALL-LINEAR"])
def test_all_linear_as_a_person_writes_it(shorthand, pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico(), target_modules=LINEAR))
    edit_json(adapter / "adapter_config.json", target_modules=shorthand)

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.stderr


def test_all_linear_without_all_of_them_is_refused(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", target_modules="all-linear")

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "10 problems" in result.stderr
    assert "the config targets it, and the adapter has no tensors for it; 10 times" in result.stderr
    assert "model.layers.{0-1}.self_attn.k_proj, " in result.stderr


def test_a_model_without_a_class_is_merged_by_its_names(pico, pico_adapter, tampered, cli, tmp_path):
    """Remote code is neither needed nor run."""
    base = tampered(pico(), "base")
    (base / "modeling_strange.py").write_text("raise SystemExit('never run')\n")
    edit_json(
        base / "config.json",
        model_type="strange",
        architectures=["StrangeForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_strange.StrangeForCausalLM"},
    )

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.stderr


def test_what_a_model_without_a_class_may_lack_is_a_warning(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    edit_json(base / "config.json", model_type="strange", architectures=["StrangeForCausalLM"])
    adapter = tampered(pico_adapter(pico()), "adapter")
    edit_json(adapter / "adapter_config.json", target_modules=r".*(q_proj|down_proj|up_proj)")

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK
    assert "warning: model.layers.0.mlp.up_proj" in result.stderr


def test_layers_that_transformers_does_not_load_need_no_tensors(pico, pico_adapter, tampered, cli, tmp_path):
    """A layer of multi-token prediction: on disk, targeted by its name, and never part of the trained model."""
    import torch
    from safetensors.torch import load_file

    from tests.tampering import edit_tensors

    base = tampered(pico(), "base")
    extra = {"model.layers.2.self_attn.q_proj.weight": torch.randn(64, 64).bfloat16()}
    edit_tensors(base / "model.safetensors", lambda tensors: tensors.update(extra))

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["model.layers.2.self_attn.q_proj.weight"], *extra.values())
