"""Adapters whose configs have the shapes of `tests.parity.config_shapes`, built by PEFT on shared tiny bases."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from tests.parity import family_building
from tests.parity.families import COMMON, ENDS, FAMILIES, UNTIED, VOCAB, Family
from tests.parity.family_building import one_thread

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.parity.config_shapes import Shape

BERT = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}  # fmt: skip
ROBERTA = {**BERT, "pad_token_id": 1, "max_position_embeddings": 66}
TOWER = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
PATCHES = {**TOWER, "image_size": 16, "patch_size": 8}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, **ENDS}


def _more(
    name: str, architecture: str, config: str, fields: Mapping[str, Any], inputs: str = "tokens"
) -> Family:
    return Family(name, architecture, config, fields, modules=(), inputs=inputs)


MORE = (
    _more("Llama, biased", "LlamaForCausalLM", "LlamaConfig", {**COMMON, **UNTIED, "attention_bias": True, "mlp_bias": True}),
    _more("Llama, tokens", "LlamaForTokenClassification", "LlamaConfig", {**COMMON, **UNTIED, "num_labels": 3}),
    _more("GPT-2, classifier", "GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "num_labels": 3, "pad_token_id": 0}),
    _more("GPT-2, padded", "GPT2LMHeadModel", "GPT2Config", {**GPT2, "pad_token_id": 0}),
    _more("BERT, classifier", "BertForSequenceClassification", "BertConfig", {**BERT, "num_labels": 3}),
    _more("BERT, tokens", "BertForTokenClassification", "BertConfig", {**BERT, "num_labels": 3}),
    _more("RoBERTa", "RobertaModel", "RobertaConfig", ROBERTA),
    _more("RoBERTa, classifier", "RobertaForSequenceClassification", "RobertaConfig", {**ROBERTA, "num_labels": 3}),
    _more("DistilBERT, classifier", "DistilBertForSequenceClassification", "DistilBertConfig", {"dim": 64, "hidden_dim": 80, "n_layers": 2, "n_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 64, "num_labels": 3}),
    _more("BLOOM", "BloomForCausalLM", "BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, **ENDS}),
    _more("Falcon", "FalconForCausalLM", "FalconConfig", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB, "ffn_hidden_size": 80, **ENDS}),
    _more("Phi", "PhiForCausalLM", "PhiConfig", {**COMMON, "num_key_value_heads": 4}),
    _more("Nemotron-H", "NemotronHForCausalLM", "NemotronHConfig", {**COMMON, "head_dim": 16, "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "tie_word_embeddings": False}),
    _more("SigLIP", "SiglipModel", "SiglipConfig", {"text_config": {**TOWER, "vocab_size": VOCAB, "max_position_embeddings": 64, "projection_size": 64}, "vision_config": PATCHES}, "image"),
    _more("BLIP", "BlipForConditionalGeneration", "BlipConfig", {"text_config": {**TOWER, "vocab_size": VOCAB, "encoder_hidden_size": 64, "max_position_embeddings": 64}, "vision_config": PATCHES}, "image"),
    _more("CLIP text", "CLIPTextModel", "CLIPTextConfig", {**TOWER, "num_hidden_layers": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, **ENDS}),
)  # fmt: skip
"""Bases beside those of the families."""


def by_name(name: str) -> Family:
    """Return a family, or a base beside them."""
    return next(family for family in (*FAMILIES, *MORE) if family.name == name)


@cache
def base(root: Path, name: str) -> Path:
    """Return the directory of a base checkpoint."""
    model = family_building.make(by_name(name))
    out = root / f"base-{[family.name for family in (*FAMILIES, *MORE)].index(name)}"
    return family_building.write(out, model, family_building.published(model))


@cache
def _loaded(directory: Path, architecture: str) -> Any:
    import transformers

    torch.manual_seed(1)  # a head that the checkpoint lacks is drawn
    return getattr(transformers, architecture).from_pretrained(directory, dtype="auto").eval()


def compute(model: Any, name: str) -> torch.Tensor:
    """Return everything that a model computes from the fixed inputs, in one row."""
    with one_thread(), torch.no_grad():
        output = model.eval()(**family_building.INPUTS[by_name(name).inputs]())
    for field in ("logits", "logits_per_image", "last_hidden_state"):
        if hasattr(output, field):
            return getattr(output, field).flatten()
    raise AssertionError(type(output))


def load(directory: Path, architecture: str) -> Any:
    """Return a merged checkpoint in transformers."""
    return _loaded.__wrapped__(directory, architecture)


def trained(root: Path, out: Path, shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Write an adapter with random factors beside its config; return what base, and base and adapter, compute."""
    family = by_name(shape.base)
    architecture = shape.trained or family.architecture
    model = copy.deepcopy(_loaded(base(root, shape.base), architecture))
    before = compute(model, shape.base)
    peft_model = _adapted(model, shape, out)
    _randomise(peft_model)
    _save(peft_model, shape, out)
    return before, compute(peft_model, shape.base)


def _adapted(model: Any, shape: Shape, out: Path) -> Any:
    """Return a model with the adapter that today's PEFT makes of a config that it reads from a file."""
    from peft import PeftConfig, get_peft_model
    from peft.tuners import tuners_utils

    _write_config(out, {**shape.config, **shape.built_with})
    config = PeftConfig.from_pretrained(out)
    config.inference_mode = False
    with pytest.MonkeyPatch.context() as patch:
        # Since 0.15 PEFT trains no out_proj of a Mamba layer, for its fast path would ignore it; adapters have it.
        patch.setattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)
        return get_peft_model(model, config)


def _write_config(out: Path, config: Mapping[str, Any]) -> None:
    out.mkdir(exist_ok=True)
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _randomise(peft_model: Any) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape) * 0.1)


def _save(peft_model: Any, shape: Shape, out: Path) -> None:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    save_file(state, out / "adapter_model.safetensors", {"format": "pt"})
    _write_config(out, shape.config)
