"""Adapters whose merge depends on a decomposition of the base: one that is not reproducible is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.tampering import edit_tensors

ALLOWED = {
    "PSOFT": ("PsoftConfig", {"r": 8}, ("--allow-svd",)),
    "OSF": ("OSFConfig", {"effective_rank": 8}, ("--allow-svd",)),
    "PiSSA": ("LoraConfig", {"r": 8, "init_lora_weights": "pissa"}, ("--base-is", "original")),
    "KaSA": ("LoraConfig", {"r": 8, "kasa_config": {}}, ()),
}


@pytest.fixture
def base(pico, tampered):
    """Return a function (degenerate?) → a base; all singular values of a degenerate q_proj are the same."""

    def build(degenerate):
        root = tampered(pico("llama", "float32"), f"base-{degenerate}")
        if degenerate:

            def flatten(tensors):
                for name, tensor in tensors.items():
                    if "q_proj" in name:
                        tensor.copy_(torch.linalg.qr(tensor).Q)

            edit_tensors(root / "model.safetensors", flatten)
        return root

    return build


def adapter_of(base, kind, out):
    """Train an adapter, in the sense of this suite: every trainable value is moved by a random number."""
    import peft
    from peft.tuners.lora.config import KasaConfig
    from transformers import AutoModelForCausalLM

    name, fields, _ = ALLOWED[kind]
    fields = fields | ({"kasa_config": KasaConfig()} if "kasa_config" in fields else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        config = getattr(peft, name)(target_modules=["q_proj"], **fields)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", ALLOWED)
def test_singular_vectors_that_rounding_turns_are_refused(kind, base, cli, tmp_path):
    root = base(degenerate=True)
    adapter = adapter_of(root, kind, tmp_path / "adapter")
    result = cli("--base", root, "--adapter", adapter, "--out", tmp_path / "out", *ALLOWED[kind][2])
    assert result.exit_code == 4, result.output
    said = " ".join(result.output.split())
    assert "self_attn.q_proj.weight" in said
    assert "the decomposition of this weight is not reproducible" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ALLOWED)
def test_singular_vectors_that_stay_as_they_are_are_merged(kind, base, cli, three_threads, tmp_path):
    root = base(degenerate=False)
    adapter = adapter_of(root, kind, tmp_path / "adapter")
    result = cli("--base", root, "--adapter", adapter, "--out", tmp_path / "out", *ALLOWED[kind][2])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == three_threads


def test_subspaces_of_other_sizes_than_in_training_are_one_sentence(pico, cli, tmp_path):
    # What another machine's clustering makes of the same weight.
    pytest.importorskip("sklearn", reason="AdaMSS clusters with scikit-learn")
    import peft
    from transformers import AutoModelForCausalLM

    root = pico("llama", "float32")
    config = peft.AdamssConfig(r=16, num_subspaces=3, subspace_rank=1, target_modules=["q_proj"])
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(root), config).save_pretrained(tmp_path / "a")

    def shorten(tensors):
        name = next(name for name in sorted(tensors) if "adamss_B" in name)
        tensors[name] = torch.ones(len(tensors[name]) + 1, *tensors[name].shape[1:])

    edit_tensors(tmp_path / "a" / "adapter_model.safetensors", shorten)
    result = cli("--base", root, "--adapter", tmp_path / "a", "--out", tmp_path / "out", "--allow-svd")
    assert result.exit_code == 4, result.output
    assert "Traceback" not in result.output
    said = " ".join(result.output.split())
    assert "q_proj.adamss_B" in said
    assert "ADAMSS: shape [" in said
    assert "AdaMSS decomposes the base's weights when it is loaded" in said
