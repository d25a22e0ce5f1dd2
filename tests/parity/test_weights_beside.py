"""Whole parameters that trainers save in files beside the adapter's own, against PEFT with those parameters put in."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_merge.cli import exits
from tests.parity import building

FLOAT32_TOLERANCE = 1e-5
"""Derived in test_kinds.py."""

PICTURE = {
    "input_ids": torch.tensor([[1, 95, 95, 95, 17, 33, 2]]),
    "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)),
}


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """Return a base that looks at pictures, an adapter of its language model, and parameters trained beside it."""
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("llava")
    base = building.base(root, "llava_tied", "float32")
    tuned = get_peft_model(
        building.make("llava_tied"), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    )
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    tuned.save_pretrained(root / "adapter")
    names = [
        name for name, _ in building.make("llava_tied").named_parameters() if "multi_modal_projector" in name
    ]
    state = building.make("llava_tied").state_dict()
    beside = {name: torch.randn_like(state[name]) * 0.3 for name in names}
    return base, root / "adapter", beside


def compute(model):
    with building.one_thread(), torch.no_grad():
        return model.eval()(**PICTURE).logits


@pytest.fixture(scope="session")
def wanted(llava):
    """Return what the model of the training computes."""
    from peft import PeftModel

    base, adapter, beside = llava
    model = building.load_afresh(base, "llava_tied")
    found = model.load_state_dict(beside, strict=False)
    assert not found.unexpected_keys
    before = compute(building.load_afresh(base, "llava_tied"))
    logits = compute(PeftModel.from_pretrained(model, adapter))
    assert (logits - before).abs().max() > 0.05 * logits.abs().max()
    return logits


@pytest.mark.parametrize(
    ("file", "spell"),
    [
        ("non_lora_trainables.bin", "base_model.model.{}"),  # LLaVA, Bunny, MoE-LLaVA, VideoLLaMA
        ("non_lora_state_dict.bin", "base_model.model.{}"),  # Qwen-VL and Phi-3-Vision
        (
            "non_lora_trainables.bin",
            "model.{}",
        ),  # as the loaders of these leave the names: base_model. is off
        ("non_lora_trainables.safetensors", "module.base_model.model.{}"),
        ("mm_projector.bin", "{}"),
        ("projector.pt", "base_model.model._orig_mod.{}"),
    ],
)
def test_what_was_trained_beside_the_adapter_is_merged(file, spell, llava, wanted, merged, tampered):
    base, adapter, beside = llava
    root = tampered(adapter)
    tensors = {spell.format(name): tensor for name, tensor in beside.items()}
    if file.endswith(".safetensors"):
        save_file(tensors, root / file)
    else:
        torch.save(tensors, root / file)
    got = compute(building.load_afresh(merged(base, root), "llava_tied"))
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * wanted.abs().max()


def test_the_names_of_older_transformers_find_their_place_too(llava, merged, tampered, stored):
    base, adapter, _ = llava
    root = tampered(adapter)
    norm = torch.rand(64)
    torch.save({"base_model.model.language_model.model.norm.weight": norm}, root / "non_lora_trainables.bin")
    out = stored(merged(base, root))
    assert out["model.language_model.norm.weight"].raw == norm.numpy().tobytes()


def test_a_module_saved_along_may_be_saved_again_beside_the_adapter(
    pico, pico_adapter, merged, tampered, cli
):
    adapter = pico_adapter(pico(), modules_to_save=["lm_head"])
    root = tampered(adapter)
    own = load_file(root / "adapter_model.safetensors")
    (head,) = [tensor for name, tensor in own.items() if "lm_head" in name]
    again = "base_model.model.lm_head.modules_to_save.default.weight"
    torch.save({again: head}, root / "non_lora_trainables.bin")
    merged(pico(), root)
    torch.save({again: head * 2}, root / "non_lora_trainables.bin")
    result = cli("plan", "--base", pico(), "--adapter", root)
    assert result.exit_code == exits.PLAN
    assert "has different values in adapter_model.safetensors and in a second file" in result.output


def test_a_file_of_parameters_that_the_base_lacks_is_named_and_may_be_left_out(llava, merged, tampered, cli):
    base, adapter, _ = llava
    root = tampered(adapter)
    torch.save({"model.mm_projector.0.weight": torch.ones(4, 4)}, root / "mm_projector.bin")
    result = cli("plan", "--base", base, "--adapter", root)
    assert result.exit_code == exits.PLAN
    assert (
        "was read from mm_projector.bin, and the base has no parameter model.mm_projector.0.weight"
        in result.output
    )
    assert "--ignore-file mm_projector.bin" in result.output
    out = merged(base, root, "--ignore-file", "mm_projector.bin")
    assert (out / "model.safetensors").read_bytes() == _merged_beside(
        cli, base, adapter, out.parent / "plain"
    )


def _merged_beside(cli, base, adapter, out):
    assert cli("--base", base, "--adapter", adapter, "--out", out).exit_code == exits.OK
    content = (out / "model.safetensors").read_bytes()
    shutil.rmtree(out)
    return content


def test_verification_by_forward_passes_takes_what_was_trained_beside_into_account(
    llava, merged, tampered, cli
):
    base, adapter, beside = llava
    root = tampered(adapter)
    torch.save(beside, root / "mm_projector.bin")
    result = cli("verify", merged(base, root), "--forward")
    assert result.exit_code == exits.OK, result.output


def test_an_empty_file_says_that_nothing_else_was_trained(pico, pico_adapter, tampered, cli):
    root = tampered(pico_adapter(pico()))
    torch.save({}, root / "non_lora_trainables.bin")
    result = cli("plan", "--base", pico(), "--adapter", root)
    assert result.exit_code == exits.OK, result.output
    assert "non_lora_trainables.bin: contains no tensors: only the LoRA was trained" in result.output
