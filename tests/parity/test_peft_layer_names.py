"""Methods that PEFT's own layers merge, with the names that a model had in another release of transformers.

PEFT itself would merge nothing of such an adapter, with a warning.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.cli import exits
from tests.parity import building

OLD = (("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."))
PLAIN = r".*\.(q_proj|fc1)"
CONTAINERS_TOO = r"^(language_model|vision_tower)(?!.*(lm_head|emb)).*(layers\.0).*"
"""As ms-swift writes it: it matches the layers themselves, and all that is in them."""


@pytest.fixture(scope="session")
def published(workshop):
    """A LLaVA under the names that it was published with."""
    root = workshop / "published"
    building.make("llava_tied").save_pretrained(root)
    assert any(name.startswith("language_model.model.") for name in load_file(root / "model.safetensors"))
    return root


@pytest.fixture(scope="session", params=["LoHaConfig", "IA3Config", "VeraConfig", "OFTConfig"])
def adapter(request, workshop):
    """An adapter of language model and vision tower, under the names of today."""
    import peft

    root = workshop / request.param
    fields = {"feedforward_modules": ["fc1"]} if request.param == "IA3Config" else {}
    if request.param == "OFTConfig":
        fields = {"oft_block_size": 8, "r": 0}
    if request.param == "VeraConfig":
        fields = {"save_projection": True}
    torch.manual_seed(2)
    model = peft.get_peft_model(
        building.make("llava_tied"), getattr(peft, request.param)(target_modules=["q_proj", "fc1"], **fields)
    )
    building.perturb(model, 0.1)
    model.save_pretrained(root)
    return root


def with_old_names(adapter, out, **config):
    """Write an adapter as it would have been saved with transformers 4."""
    shutil.copytree(adapter, out)
    tensors = {}
    for name, tensor in load_file(out / "adapter_model.safetensors").items():
        for new, old in OLD:
            name = name.replace(f"base_model.model.{new}", f"base_model.model.{old}")  # noqa: PLW2901
        tensors[name] = tensor
    assert any(".language_model.model." in name for name in tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def weights(root):
    return load_file(root / "model.safetensors")


@pytest.mark.parametrize("targets", [["q_proj", "fc1"], PLAIN], ids=["list", "regex"])
def test_old_names_merge_as_the_names_of_today(targets, adapter, published, cli, tmp_path):
    old = with_old_names(adapter, tmp_path / "old", target_modules=targets)
    for name, source in (("today", adapter), ("merged", old)):
        result = cli("--base", published, "--adapter", source, "--out", tmp_path / name)
        assert result.exit_code == exits.OK, result.stderr
    before, today, merged = (weights(root) for root in (published, tmp_path / "today", tmp_path / "merged"))
    assert merged.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert any(name.startswith("language_model.") for name in changed)
    assert any(name.startswith("vision_tower.") for name in changed)
    assert all(torch.equal(today[name], merged[name]) for name in before)


def test_a_regex_over_containers_means_the_layers_that_have_tensors(adapter, published, cli, tmp_path):
    old = with_old_names(adapter, tmp_path / "old", target_modules=CONTAINERS_TOO)
    tensors = load_file(old / "adapter_model.safetensors")
    first = {
        name: tensor
        for name, tensor in tensors.items()
        if "layers.0." in name or not name.startswith("base_model.model.")
    }
    save_file(first, old / "adapter_model.safetensors")
    result = cli("--base", published, "--adapter", old, "--out", tmp_path / "merged")
    assert result.exit_code == exits.OK, result.stderr
    before, merged = weights(published), weights(tmp_path / "merged")
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed
    assert all("layers.0." in name for name in changed)


def test_a_tensor_that_its_own_regex_does_not_mean_is_refused(adapter, published, cli, tmp_path):
    old = with_old_names(adapter, tmp_path / "old", target_modules=r"^language_model.*\.(q_proj|fc1)")
    result = cli("--base", published, "--adapter", old, "--out", tmp_path / "merged")
    assert result.exit_code == exits.PLAN
    assert "vision_tower" in result.stderr
    assert "target_modules does not match it" in result.stderr


def test_patterns_over_old_names_keep_their_meaning(published, cli, tmp_path):
    from peft import LoHaConfig, get_peft_model

    torch.manual_seed(4)
    ranks, alphas = (
        {"language_model.layers.1.self_attn.q_proj": 2},
        {"language_model.layers.0.self_attn.q_proj": 32},
    )
    config = LoHaConfig(target_modules=["q_proj"], r=4, alpha=8, rank_pattern=ranks, alpha_pattern=alphas)
    model = get_peft_model(building.make("llava_tied"), config)
    building.perturb(model, 0.1)
    model.save_pretrained(tmp_path / "today")
    patterns = {
        field: {
            name.replace("language_model.", "language_model.model."): value for name, value in table.items()
        }
        for field, table in (("rank_pattern", ranks), ("alpha_pattern", alphas))
    }
    with_old_names(tmp_path / "today", tmp_path / "old", **patterns)
    for name in ("today", "old"):
        result = cli("--base", published, "--adapter", tmp_path / name, "--out", tmp_path / f"of-{name}")
        assert result.exit_code == exits.OK, result.stderr
    today, merged = weights(tmp_path / "of-today"), weights(tmp_path / "of-old")
    assert all(torch.equal(today[name], merged[name]) for name in today)
