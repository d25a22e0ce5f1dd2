"""The order of rows in llama.cpp's weights, and the factors by which its converter multiplies weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_merge.conversion.writers.gguf.config import check_divides, multiplier, multipliers, whole


def rows_of(arch: str, config: Mapping[str, Any], path: str, n_out: int, *, permuted: bool) -> Sequence[int]:
    """Return the rows of a weight in llama.cpp's order: the index of each row in the base.

    Reference:
        ``LlamaModel.permute`` (conversion/llama.py) and ``GPTNeoXModel.modify_tensors`` of llama.cpp.
    """
    last = path.rpartition(".")[2]
    # GPT-NeoX: [head, q k v, size] → [q k v, head, size].
    if arch == "gptneox" and last == "query_key_value":
        n_heads = whole(config, "num_attention_heads")
        check_divides("num_attention_heads", 3 * n_heads, n_out, path)
        return _grid(n_out, (n_heads, 3, n_out // n_heads // 3), (1, 0, 2))
    if not permuted or last not in {"q_proj", "k_proj"}:
        return range(n_out)
    # With grouped queries, k has fewer heads than q.
    is_grouped = last == "k_proj" and config.get("num_key_value_heads") is not None
    key = "num_key_value_heads" if is_grouped else "num_attention_heads"
    n_heads = whole(config, key)
    check_divides(key, 2 * n_heads, n_out, path)
    return _rotated(range(n_out), n_heads)


def wqkv_rows(config: Mapping[str, Any], path: str, n_out: int) -> dict[str, Sequence[int]]:
    """Return the rows of q, k and v in InternLM2's fused matrix, in llama.cpp's order.

    Reference:
        ``InternLM2Model.modify_tensors`` (conversion/internlm.py) of llama.cpp.
    """
    n_heads = whole(config, "num_attention_heads")
    n_kv = whole(config, "num_key_value_heads")
    check_divides("num_key_value_heads", n_kv, n_heads, "num_attention_heads")
    check_divides("num_attention_heads", 2 * (n_heads + 2 * n_kv), n_out, path)
    # Each group has its q heads, then one k and one v.
    per_group = n_heads // n_kv + 2
    size = n_out // (n_kv * per_group)
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for row in range(n_out):
        place = row // size % per_group
        rows["q" if place < per_group - 2 else "k" if place == per_group - 2 else "v"].append(row)
    return {"q": _rotated(rows["q"], n_heads), "k": _rotated(rows["k"], n_kv), "v": rows["v"]}


def factors_of(arch: str, config: Mapping[str, Any], path: str, n_out: int) -> float | Sequence[float]:
    """Return the factor by which llama.cpp's converter multiplies a weight, or one for each row (Falcon-H1).

    Reference:
        ``FalconH1Model.modify_tensors`` (conversion/falcon_h1.py) of llama.cpp.
    """
    if arch != "falcon-h1":
        return 1.0
    last = path.rpartition(".")[2]
    gate, down = multipliers(config, "mlp_multipliers", 2)
    attention = multiplier(config, "attention_in_multiplier")
    if last == "in_proj":
        return _mamba_factors(config, path, n_out)
    factors = {
        "gate_proj": gate,
        "down_proj": down,
        "q_proj": attention,
        "v_proj": attention,
        "k_proj": attention * multiplier(config, "key_multiplier"),
        "o_proj": multiplier(config, "attention_out_multiplier"),
        "out_proj": multiplier(config, "ssm_out_multiplier"),
        "lm_head": multiplier(config, "lm_head_multiplier"),
        "embed_tokens": multiplier(config, "embedding_multiplier"),
    }
    return float(factors.get(last, 1.0))


def _mamba_factors(config: Mapping[str, Any], path: str, n_out: int) -> list[float]:
    """Return the factor of each row of a Mamba input projection; z, x, B, C and dt have one factor each."""
    n_inner = whole(config, "mamba_d_ssm", most=n_out)
    n_state = whole(config, "mamba_n_groups", most=n_out) * whole(config, "mamba_d_state", most=n_out)
    sizes = (n_inner, n_inner, n_state, n_state, max(0, n_out - 2 * n_inner - 2 * n_state))
    check_divides("mamba_d_ssm", sum(sizes), n_out, path)
    parts = multipliers(config, "ssm_multipliers", len(sizes))
    every = multiplier(config, "ssm_in_multiplier")
    return [part * every for part, size in zip(parts, sizes, strict=True) for _ in range(size)]


def _rotated(rows: Sequence[int], n_heads: int) -> list[int]:
    """Return rows in llama.cpp's order for rotary embeddings: the two halves of each head, interleaved."""
    size = len(rows) // n_heads
    return [
        rows[head * size + half * (size // 2) + n]
        for head in range(n_heads)
        for n in range(size // 2)
        for half in (0, 1)
    ]


def _grid(n: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """Return the indices of a grid of some shape, read after its axes were exchanged."""
    import numpy as np

    return [int(row) for row in np.arange(n).reshape(shape).transpose(axes).reshape(-1)]
