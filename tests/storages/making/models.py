"""The small models that are quantised: one layer, 32 tokens, weights that look trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 32
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
"""Groups of 128 fit its columns, and k and v have fewer rows than q."""

SHAPES = {
    "llama": {},
    # For storages of a byte a value and small groups: three groups of 32 in each row of down.
    "narrow": {"intermediate_size": 96},
    # 128×128 blocks fit every weight: their encoder passes over a weight that they do not fit.
    "blocks": {"num_key_value_heads": 4},
    # k and v have 128 blocks of 64 values, up and gate 384: half of the 256 that one nested scale is for, and one and a half.
    "nested": {"intermediate_size": 192},
    # q is 576×448, 4.5 blocks by 3.5: the grid of 5×4 does not divide it.
    "ragged": {
        "hidden_size": 448,
        "intermediate_size": 64,
        "num_attention_heads": 16,
        "num_key_value_heads": 1,
        "head_dim": 36,
    },
    # up and gate are 192×256, 1.5 blocks by 2: the grid of 2×2 divides them, into the wrong blocks.
    "ragged evenly": {
        "hidden_size": 256,
        "intermediate_size": 192,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
}


def build(kind: str, root: Path) -> Path:
    """Write a model in bfloat16, always the same, with a tokenizer that calibration asks for."""
    import torch
    import transformers as t

    torch.manual_seed(0)
    model = _model(kind, t)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                rows = torch.exp(0.5 * torch.randn(*parameter.shape[:-1], 1, generator=generator))
                parameter.copy_(0.06 * rows * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(root)
    write_tokenizer(root)
    return root


def _model(kind: str, t: Any) -> Any:
    if kind == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL))
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**{**SMALL, **SHAPES["blocks"], **experts}))
    if kind == "gpt_oss":
        return t.GptOssForCausalLM(_gpt_oss(t))
    return t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, **SHAPES[kind]}))


def _gpt_oss(t: Any) -> Any:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 32}
    # Two layers: the experts of one can be dense beside those of the other.
    shape = {
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return t.GptOssConfig(**{**SMALL, **shape, **experts, "rope_parameters": yarn})


def write_tokenizer(root: Path) -> None:
    """Write a tokenizer that only says which tokens there are."""
    import transformers as t
    from tokenizers import Tokenizer, models

    words = {f"t{n}": n for n in range(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    ).save_pretrained(root)
