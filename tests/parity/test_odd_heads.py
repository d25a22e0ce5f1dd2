"""Tied heads that are not called ``lm_head``, embeddings that are not ``embed_tokens``, ties of more than two.

The oracle is PEFT's forward pass, unmerged.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import family_building as building
from tests.parity.building import perturb

FLOAT32_TOLERANCE = 3e-5
LEAST_EFFECT = 0.05
FACTORS = {"r": 4, "lora_alpha": 6}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT, LoRA on the embedding: the head's bias is tied too": (
        "BERT",
        {**FACTORS, "target_modules": ["query", "word_embeddings"]},
    ),
    "BERT, the embedding trained whole": (
        "BERT",
        {**FACTORS, "target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
    ),
    "BERT, LoRA on the head": ("BERT", {**FACTORS, "target_modules": ["query", "decoder"]}),
    "Whisper, LoRA on the head": ("Whisper", {**FACTORS, "target_modules": ["q_proj", "proj_out"]}),
    "Whisper, the head trained whole": (
        "Whisper",
        {**FACTORS, "target_modules": ["q_proj"], "modules_to_save": ["proj_out"]},
    ),
    "Whisper, trained tokens": (
        "Whisper",
        {**FACTORS, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 17]}},
    ),
    "GPT-2, a word that PEFT heeds for embed_tokens alone": (
        "GPT-2",
        {**FACTORS, "target_modules": ["c_attn", "wte"], "ensure_weight_tying": True},
    ),
}


def trained(family, base, out, fields):
    """Train an adapter, and return what base and adapter compute unmerged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    model = get_peft_model(building.load(base, family), LoraConfig(**fields))
    perturb(model, 0.1)
    model.save_pretrained(out)
    return building.compute(PeftModel.from_pretrained(building.load(base, family), out), family)


@pytest.mark.parametrize("stored", ["one end", "both ends"])
@pytest.mark.parametrize("case", CASES)
def test_what_base_and_adapter_compute(case, stored, workshop, cli, tmp_path):
    name, fields = CASES[case]
    family = building.by_name(name)
    base = tmp_path / "base"
    model = building.make(family)
    model.save_pretrained(base)
    if stored == "both ends":
        tensors = load_file(base / "model.safetensors")
        tied = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if "encoder." not in target
        }
        tensors |= {target: model.state_dict()[source].clone() for target, source in tied.items()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    wanted = trained(family, base, tmp_path / "adapter", fields)
    assert (building.compute(building.load(base, family), family) - wanted).abs().max() > LEAST_EFFECT
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    got = building.compute(building.load(tmp_path / "out", family), family)
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE


def test_a_copy_of_the_embedding_that_would_stay_behind_is_refused(cli, tmp_path):
    family = building.by_name("T5")
    model = building.make(family)
    model.save_pretrained(tmp_path / "base")
    fields = {**FACTORS, "target_modules": ["q"], "trainable_token_indices": {"shared": [1, 17]}}
    trained(family, tmp_path / "base", tmp_path / "adapter", fields)
    path = tmp_path / "base" / "model.safetensors"
    copy = "encoder.embed_tokens.weight"
    save_file({**load_file(path), copy: model.shared.weight.detach().clone()}, path, {"format": "pt"})
    result = cli("--base", tmp_path / "base", "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert f"shared.weight: is stored a second time as {copy}" in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_an_adapter_of_a_model_without_its_head(name, workshop, cli, tmp_path):
    """PEFT writes pathless entries, and the names lack the prefix that the head's model gives them."""
    from peft import LoraConfig, PeftModel, get_peft_model

    family = building.by_name(name)
    base = building.base(workshop, name, "published")
    inner = building.load(base, family).model
    torch.manual_seed(3)
    model = get_peft_model(inner, LoraConfig(**FACTORS, target_modules="all-linear"))
    perturb(model, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    whole = building.load(base, family)
    whole.model = PeftModel.from_pretrained(whole.model, tmp_path / "adapter").merge_and_unload()
    wanted = building.compute(whole, family)
    result = cli("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    got = building.compute(building.load(tmp_path / "out", family), family)
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("layout", ["published", "in memory"])
def test_svd_keeps_the_rank_of_all_that_a_matrix_holds(layout, workshop, merged):
    """One adapter loses nothing: gate and up of one expert, or fused, have their ranks side by side."""
    family = building.by_name("Mixtral")
    found = building.written(workshop, family, "transformers 4")
    out = merged(building.base(workshop, "Mixtral", layout), found.adapter, "--combine", "svd")
    got = building.compute(building.load(out, family), family)
    assert (got - found.wanted).abs().max() <= FLOAT32_TOLERANCE


def test_a_combination_of_stacked_experts_says_that_the_layout_counts(workshop, cli, tmp_path):
    family = building.by_name("Mixtral")
    adapter = building.written(workshop, family, "transformers 4").adapter
    said = {}
    for layout in ("published", "in memory"):
        base = building.base(workshop, "Mixtral", layout)
        result = cli("plan", "--base", base, "--adapter", adapter, "--adapter", adapter, "--combine", "ties")
        said[layout] = "hold several weights (" in result.stderr
    assert said == {"published": False, "in memory": True}
