"""Which rows of a weight llama.cpp has where, and what its converter multiplies them by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_merge.conversion.writers.gguf.config import check_divides, multiplier, multipliers, whole


def rows_of(arch: str, config: Mapping[str, Any], path: str, n_out: int, *, permuted: bool) -> Sequence[int]:
    """Return which of a weight's rows llama.cpp has at each place.

    Reference:
        ``LlamaModel.permute`` (conversion/llama.py) and ``GPTNeoXModel.modify_tensors`` of llama.cpp.
    """
    last = path.rpartition(".")[2]
    if arch == "gptneox" and last == "query_key_value":
        n_heads = whole(config, "num_attention_heads")
        check_divides("num_attention_heads", 3 * n_heads, n_out, path)
        return _grid(n_out, (n_heads, 3, n_out // n_heads // 3), (1, 0, 2))
    if not permuted or last not in {"q_proj", "k_proj"}:
        return range(n_out)
    is_grouped = last == "k_proj" and config.get("num_key_value_heads") is not None
    key = "num_key_value_heads" if is_grouped else "num_attention_heads"
    n_heads = whole(config, key)
    check_divides(key, 2 * n_heads, n_out, path)
    return _rotated(range(n_out), n_heads)


def wqkv_rows(config: Mapping[str, Any], path: str, n_out: int) -> dict[str, Sequence[int]]:
    """Return the rows of q, k and v in InternLM2's one matrix.

    Reference:
        ``InternLM2Model.modify_tensors`` (conversion/internlm.py) of llama.cpp.
    """
    n_heads = whole(config, "num_attention_heads")
    n_kv = whole(config, "num_key_value_heads")
    check_divides("num_key_value_heads", n_kv, n_heads, "num_attention_heads")
    check_divides("num_attention_heads", 2 * (n_heads + 2 * n_kv), n_out, path)
    per_group = n_heads // n_kv + 2
    size = n_out // (n_kv * per_group)
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for row in range(n_out):
        place = row // size % per_group
        rows["q" if place < per_group - 2 else "k" if place == per_group - 2 else "v"].append(row)
    return {"q": _rotated(rows["q"], n_heads), "k": _rotated(rows["k"], n_kv), "v": rows["v"]}


def factors_of(arch: str, config: Mapping[str, Any], path: str, n_out: int) -> float | Sequence[float]:
    """Return what llama.cpp's converter multiplies a weight by, all of it or row by row: Falcon-H1's multipliers.

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
    """Return the factor of each row of a Mamba layer's input projection: z, x, B, C and dt have one each."""
    n_inner = whole(config, "mamba_d_ssm", most=n_out)
    n_state = whole(config, "mamba_n_groups", most=n_out) * whole(config, "mamba_d_state", most=n_out)
    sizes = (n_inner, n_inner, n_state, n_state, max(0, n_out - 2 * n_inner - 2 * n_state))
    check_divides("mamba_d_ssm", sum(sizes), n_out, path)
    parts = multipliers(config, "ssm_multipliers", len(sizes))
    every = multiplier(config, "ssm_in_multiplier")
    return [part * every for part, size in zip(parts, sizes, strict=True) for _ in range(size)]


def _rotated(rows: Sequence[int], n_heads: int) -> list[int]:
    """Return rows in llama.cpp's order of a rotary embedding: the two halves of a head, interleaved."""
    size = len(rows) // n_heads
    return [
        rows[head * size + half * (size // 2) + n]
        for head in range(n_heads)
        for n in range(size // 2)
        for half in (0, 1)
    ]


def _grid(n: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """Return the numbers from 0 on, laid out in a shape whose axes are then exchanged."""
    import numpy as np

    return [int(row) for row in np.arange(n).reshape(shape).transpose(axes).reshape(-1)]
