"""Targets as trainers write them, and models that transformers has no class for."""

from __future__ import annotations

import json

import pytest

from lora_merge.cli import exits
from tests.parity import building
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

    adapter = tampered(pico_adapter(pico()), "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(base))

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict")

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


# Names that the base has nothing for: PEFT skips them without a word.


def quiet(result):
    """Check that a command went through and had at most notes to give."""
    assert result.exit_code == exits.OK, result.output
    assert "warning" not in result.output
    return result


@pytest.mark.parametrize(
    "entry",
    ["wqkv", "query_key_value", "model.layers.7.self_attn.q_proj", "vision_tower.q_proj", ".*k_proj"],
)
def test_a_target_that_the_base_lacks_is_a_note(entry, pico, pico_adapter, tampered, cli, tmp_path):
    base, plain = pico(), pico_adapter(pico())
    adapter = tampered(plain)
    edit_json(adapter / "adapter_config.json", target_modules=["q_proj", "down_proj", entry])

    result = quiet(cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict"))
    cli("--base", base, "--adapter", plain, "--out", tmp_path / "plain")

    assert f"note: target_modules: the base has no module called {entry!r}" in result.stderr
    one, other = (tmp_path / name / "model.safetensors" for name in ("out", "plain"))
    assert one.read_bytes() == other.read_bytes()
    quiet(cli("inspect", adapter, "--base", base))
    quiet(cli("convert", adapter, "--for", "vllm", "--base", base, "--out", tmp_path / "vllm"))


LOOSE = {
    "modules_to_save": (["vision_tower", "score"], "note"),
    "target_parameters": (["gate.weight", "experts.gate_up_proj"], "note"),
    "rank_pattern": ({"gate_up_proj": 8}, "warning"),
    "alpha_pattern": ({r"layers\.9\.self_attn\.q_proj": 8}, "warning"),
    "exclude_modules": (["visual"], ""),
    "layers_to_transform": ([0, 1, 2, 3], ""),
}


@pytest.mark.parametrize("field", LOOSE)
def test_another_field_may_name_what_the_base_lacks(field, pico, pico_adapter, tampered, cli, tmp_path):
    """PEFT itself warns of patterns, so that they are a warning here."""
    base = pico()
    adapter = tampered(pico_adapter(base))
    value, severity = LOOSE[field]
    edit_json(adapter / "adapter_config.json", **{field: value})

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.output
    assert (f"{severity}: {field}: " in result.stderr) is bool(severity)
    assert ("warning" in result.stderr) is (severity == "warning")


def test_a_method_of_peft_s_own_layers_may_name_a_saved_module_that_the_base_lacks(pico, tmp_path, cli):
    from peft import LoHaConfig, get_peft_model

    from tests.conftest import build_model

    model = get_peft_model(
        build_model("llama"), LoHaConfig(r=2, target_modules=["q_proj", "wqkv"], modules_to_save=["score"])
    )
    building.perturb(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")

    result = cli(
        "--base", pico("llama", "float32"), "--adapter", tmp_path / "adapter", "--out", tmp_path / "out"
    )

    assert result.exit_code == exits.OK, result.output
    assert "note: modules_to_save: the base has no module called 'score'" in result.stderr


def test_without_a_base_a_loose_entry_is_a_warning(pico, pico_adapter, tampered, cli):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", modules_to_save=["score"], rank_pattern={"wqkv": 8})

    result = cli("inspect", adapter)

    assert result.exit_code == exits.OK
    for words in ("modules_to_save: has the entry 'score'", "rank_pattern: 'wqkv' matches none", "--base"):
        assert words in result.output


def test_an_mlx_key_that_the_base_lacks_is_a_note(pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "float32")
    cli("convert", pico_adapter(base), "--format", "mlx", "--base", base, "--out", tmp_path / "mlx")
    config = tmp_path / "mlx" / "adapter_config.json"
    settings = json.loads(config.read_text())["lora_parameters"]
    edit_json(config, lora_parameters={**settings, "keys": [*settings["keys"], "mlp.switch_mlp.up_proj"]})

    result = quiet(cli("--base", base, "--adapter", tmp_path / "mlx", "--out", tmp_path / "out"))

    assert "note: lora_parameters.keys: the base has no module called" in result.stderr


# Targets that are null: PEFT's own for the family.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["LORA", "ADALORA"])
def test_null_targets_are_peft_s_own_for_the_family(family, kind, pico, tampered, cli, tmp_path):
    import peft

    from tests.conftest import build_model
    from tests.parity.building import perturb

    config = (
        peft.LoraConfig(r=2) if kind == "LORA" else peft.AdaLoraConfig(init_r=2, target_r=2, total_step=9)
    )
    model = peft.get_peft_model(build_model(family), config)
    perturb(model, 0.1)
    model.save_pretrained(tmp_path / "listed")
    adapter = tampered(tmp_path / "listed")
    edit_json(adapter / "adapter_config.json", target_modules=None)

    for root in (tmp_path / "listed", adapter):
        out = tmp_path / "out" / root.name
        result = cli("--base", pico(family, "float32"), "--adapter", root, "--out", out)
        assert result.exit_code == exits.OK, result.output

    one, other = (tmp_path / "out" / name / "model.safetensors" for name in ("listed", "tampered"))
    assert one.read_bytes() == other.read_bytes()
    assert "PEFT's own for the family (null)" in cli("inspect", adapter).stdout


def test_a_conversion_writes_out_what_null_targets_mean(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico(), target_modules=["q_proj", "v_proj"]))
    edit_json(adapter / "adapter_config.json", target_modules=None)

    result = cli("convert", adapter, "--rank", 8, "--base", pico(), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.output
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj", "v_proj"]


def test_null_targets_that_do_not_cover_the_tensors_are_named(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", target_modules=None)

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert (
        "target_modules is null, so PEFT uses its default targets for this family: q_proj, v_proj"
        in result.stderr
    )


def test_null_targets_of_a_family_without_any_are_refused(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    edit_json(base / "config.json", model_type="strange", architectures=["StrangeForCausalLM"])
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", target_modules=None)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "PEFT has no default targets for the family 'strange'" in result.stderr
    assert '["down_proj", "q_proj"]' in result.stderr
