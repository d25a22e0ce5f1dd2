"""A Llama under InternLM2's names: queries, keys and values are one matrix, group by group.

transformers has no class for InternLM2, and engines have their own; so what is right is said by the Llama.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

CONFIG_CODE = '''\
"""The configuration of InternLM2."""

from transformers.configuration_utils import PretrainedConfig


class InternLM2Config(PretrainedConfig):
    model_type = "internlm2"

    def __init__(self, bias=False, rope_theta=10000, rope_scaling=None, hidden_act="silu", **fields):
        self.bias = bias
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        self.hidden_act = hidden_act
        super().__init__(**fields)
'''
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip
NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
}
QUERIES, KEYS, VALUES = (f"self_attn.{name}_proj" for name in "qkv")


def save(llama: Any, out: Path) -> None:
    """Write a Llama as an InternLM2 checkpoint."""
    out.mkdir(parents=True)
    save_file(tensors(llama), out / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"},
        "dtype": "float32",
        "bias": False,
        "rope_theta": 10000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        **{name: getattr(llama.config, name) for name in KEPT},
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "configuration_internlm2.py").write_text(CONFIG_CODE)


def tensors(llama: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint."""
    state = llama.state_dict()
    found = {
        _named(name): tensor for name, tensor in state.items() if "self_attn" not in name or "o_proj" in name
    }
    for n in range(llama.config.num_hidden_layers):
        layer = f"model.layers.{n}."
        parts = (state[f"{layer}{name}.weight"] for name in (QUERIES, KEYS, VALUES))
        found[f"{layer}attention.wqkv.weight"] = _grouped(llama.config, *parts)
    return found


def _named(name: str) -> str:
    """Return InternLM2's name of a Llama's parameter."""
    for new, old in NAMES.items():
        name = name.replace(f"{old}.", f"{new}.")
    return name


def _grouped(config: Any, queries: Any, keys: Any, values: Any) -> torch.Tensor:
    """Return one matrix: of each group its queries, its key, its value."""
    n_groups, width = config.num_key_value_heads, config.head_dim
    parts = (part.view(n_groups, -1, width, config.hidden_size) for part in (queries, keys, values))
    return torch.cat(list(parts), 1).reshape(-1, config.hidden_size).contiguous()


def _ungrouped(config: Any, matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the queries, keys and values of such a matrix."""
    n_groups, width = config.num_key_value_heads, config.head_dim
    n_queries = config.num_attention_heads // n_groups
    groups = matrix.view(n_groups, n_queries + 2, width, config.hidden_size)
    parts = (groups[:, :n_queries], groups[:, n_queries], groups[:, n_queries + 1])
    return tuple(part.reshape(-1, config.hidden_size) for part in parts)


def train(llama: Any, out: Path, fields: Mapping[str, Any]) -> tuple[Any, Any]:
    """Write an adapter with InternLM2's names; return the Llama without and with what it changes."""
    out.mkdir(parents=True)
    trained = copy.deepcopy(llama)
    state = trained.state_dict()
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, weight in tensors(llama).items():
        path = name.removesuffix(".weight")
        if path.rpartition(".")[2] not in fields["target_modules"]:
            continue
        a = torch.randn(fields["r"], weight.shape[1], generator=generator) * 0.08
        b = torch.randn(weight.shape[0], fields["r"], generator=generator) * 0.06
        factors |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        for parameter, change in _placed(llama.config, name, fields["lora_alpha"] / fields["r"] * (b @ a)):
            state[parameter] += change
    save_file(factors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, **fields}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return llama, trained


def _placed(config: Any, name: str, change: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return the Llama's parameters behind a matrix, each with its part of a change."""
    if name.endswith("wqkv.weight"):
        layer = name.removesuffix("attention.wqkv.weight")
        names = (f"{layer}{part}.weight" for part in (QUERIES, KEYS, VALUES))
        return list(zip(names, _ungrouped(config, change), strict=True))
    for new, old in NAMES.items():
        name = name.replace(f"{new}.", f"{old}.")
    return [(name, change)]
