"""A dense Llama that every scheme of ``--quantize`` fits, its adapters, and what a merge made of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.storages.making.models import write_tokenizer
from tests.storages.quantising import digest_of
from tests.storages.reference import LINEAR, RANK, tensors_of

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
"""Blocks of 128 fit q, k and v each, which engines load as one."""

TALL = {"num_hidden_layers": 1, "intermediate_size": 2304}
"""Gate and up have 2304 rows: more than a band of 2048, whose rows are rounded together where the adapter's effect is kept."""


def build(root: Path, dtype: str = "bfloat16", **fields: Any) -> Path:
    """Write a Llama whose rows are of different sizes, as trained ones are. Always the same."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, **fields}))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                rows = torch.exp(0.4 * torch.randn(len(parameter), 1, generator=generator))
                parameter.copy_(0.06 * rows * torch.randn(parameter.shape, generator=generator))
    model.to(getattr(torch, dtype)).save_pretrained(root)
    write_tokenizer(root)
    return root


def lora(
    base: Path,
    root: Path,
    *,
    share: float = 0.03,
    modules: tuple[str, ...] = LINEAR,
    idle: tuple[str, ...] = (),
) -> Path:
    """Write a LoRA on a dense model, or on one of the same shape.

    Args:
        base: whose configuration counts.
        root: where to.
        share: of the size of a weight that its change has, about.
        modules: that it is on.
        idle: modules among them whose change is zero.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(modules)))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif "lora_B" in name:
                spread = 0.0 if name.split(".")[-4] in idle else share * 0.06 * RANK**-0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.save_pretrained(root, save_embedding_layers=False)
    return root


def of_head(base: Path, root: Path) -> Path:
    """Write a LoRA on the head, which no scheme quantises. One that changes nothing at all would be refused."""
    return lora(base, root, modules=("lm_head",))


def apart_from_head(root: Path) -> dict[str, Any]:
    """Return dtype, shape and bytes of all tensors but the head, by name, and the configuration."""
    found = {name: digest_of(one) for name, one in tensors_of(root).items() if name != "lm_head.weight"}
    return {**found, "config": json.loads((root / "config.json").read_text())}


def content(root: Path) -> dict[str, bytes]:
    """Return the bytes of weight files, index and configuration, by name."""
    files = [*root.glob("*.safetensors"), *root.glob("*.index.json"), root / "config.json"]
    return {path.name: path.read_bytes() for path in sorted(files)}
