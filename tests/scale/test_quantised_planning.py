"""A plan of DeepSeek-V3 as it is published takes seconds, and little memory: 163 files, 46 000 FP8 weights with their scales."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.scale.test_planning import reference, run

pytestmark = pytest.mark.system

N_FILES, N_LAYERS, N_DENSE, N_EXPERTS = 163, 61, 3, 256
HIDDEN, NARROW, WIDE, VOCAB, N_HEADS, BLOCK = 7168, 2048, 18432, 129280, 128, 128
Q_RANK, KV_RANK, NOPE, ROPE, V = 1536, 512, 128, 64, 128

SECONDS = 20
"""Of processor time, on a machine that does the `reference` in a second; a slower one has as much more."""
BYTES = 500_000_000

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "hidden_size": HIDDEN, "intermediate_size": WIDE, "moe_intermediate_size": NARROW, "vocab_size": VOCAB,
    "num_hidden_layers": N_LAYERS, "first_k_dense_replace": N_DENSE, "n_routed_experts": N_EXPERTS,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_attention_heads": N_HEADS,
    "num_key_value_heads": N_HEADS, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": V, "num_nextn_predict_layers": 1, "tie_word_embeddings": False,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]
    },
}  # fmt: skip


def mlp(prefix, width):
    yield f"{prefix}.gate_proj", (width, HIDDEN)
    yield f"{prefix}.up_proj", (width, HIDDEN)
    yield f"{prefix}.down_proj", (HIDDEN, width)


def attention(layer):
    yield f"{layer}.self_attn.q_a_proj", (Q_RANK, HIDDEN)
    yield f"{layer}.self_attn.q_b_proj", (N_HEADS * (NOPE + ROPE), Q_RANK)
    yield f"{layer}.self_attn.kv_a_proj_with_mqa", (KV_RANK + ROPE, HIDDEN)
    yield f"{layer}.self_attn.kv_b_proj", (N_HEADS * (NOPE + V), KV_RANK)
    yield f"{layer}.self_attn.o_proj", (HIDDEN, N_HEADS * V)


def experts(layer, n):
    if n < N_DENSE:
        yield from mlp(f"{layer}.mlp", WIDE)
        return
    yield from mlp(f"{layer}.mlp.shared_experts", NARROW)
    for expert in range(N_EXPERTS):
        yield from mlp(f"{layer}.mlp.experts.{expert}", NARROW)


def stored():
    """Yield name, dtype, shape of every tensor, in the order of the layers; the last layer predicts further tokens."""
    yield "model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN)
    for n in range(N_LAYERS + 1):
        layer = f"model.layers.{n}"
        for name, shape in (*attention(layer), *experts(layer, n)):
            yield f"{name}.weight", "F8_E4M3", shape
            yield f"{name}.weight_scale_inv", "F32", tuple(-(-size // BLOCK) for size in shape)
        for norm, size in (("input", HIDDEN), ("post_attention", HIDDEN)):
            yield f"{layer}.{norm}_layernorm.weight", "BF16", (size,)
        yield f"{layer}.self_attn.q_a_layernorm.weight", "BF16", (Q_RANK,)
        yield f"{layer}.self_attn.kv_a_layernorm.weight", "BF16", (KV_RANK,)
        if n >= N_DENSE:
            yield f"{layer}.mlp.gate.weight", "BF16", (N_EXPERTS, HIDDEN)
            yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (N_EXPERTS,)
    extra = f"model.layers.{N_LAYERS}"
    yield f"{extra}.eh_proj.weight", "BF16", (HIDDEN, 2 * HIDDEN)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{extra}.{norm}.weight", "BF16", (HIDDEN,)
    yield "model.norm.weight", "BF16", (HIDDEN,)
    yield "lm_head.weight", "BF16", (VOCAB, HIDDEN)


def write_sparse(path: Path, tensors, filled: bytes = b"") -> int:
    """Write a header, and a hole for the data, whose first bytes may be filled. Return the bytes of the tensors."""
    header, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * {"F8_E4M3": 1, "BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + filled)
        file.truncate(8 + len(text) + end)
    return end


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("deepseek")
    tensors = list(stored())
    assert sum(dtype == "F8_E4M3" for _, dtype, _ in tensors) > 45_000
    size = -(-len(tensors) // N_FILES)
    weight_map, total = {}, 0
    for n in range(N_FILES):
        file, held = f"model-{n + 1:05}-of-{N_FILES:06}.safetensors", tensors[n * size : (n + 1) * size]
        total += write_sparse(root / file, held)
        weight_map |= {name: file for name, _, _ in held}
    assert total > 671e9
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_text(json.dumps(CONFIG))
    return root


def write_adapter(root, modules):
    root.mkdir()
    factors = []
    for name, (n_out, n_in) in modules:
        factors.append((f"base_model.model.{name}.lora_A.weight", "BF16", (1, n_in)))
        factors.append((f"base_model.model.{name}.lora_B.weight", "BF16", (n_out, 1)))
    # One pair that is not zero: else the adapter is refused as untrained.
    write_sparse(root / "adapter_model.safetensors", factors, b"\x3c\x3c" * sum(modules[0][1]))
    targets = sorted({name.rpartition(".")[2] for name, _ in modules})
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 4, "target_modules": targets}
    config["layers_to_transform"] = list(range(N_LAYERS))
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


PARTS = {
    "attention": lambda n: list(attention(f"model.layers.{n}")),
    "every expert": lambda n: list(experts(f"model.layers.{n}", n)),
}


@pytest.mark.parametrize("part", PARTS)
def test_deepseek_v3_is_planned_in_seconds(part, base, tmp_path):
    modules = [one for n in range(N_LAYERS) for one in PARTS[part](n)]
    adapter = write_adapter(tmp_path / "adapter", modules)
    ran = run(
        tmp_path, "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--dry-run", "--json"
    )
    assert ran.code == 0, ran.err[-2000:]
    summary = json.loads(ran.out)["summary"]
    assert summary["n_merged"] == len(modules)
    # Decoded, 688 GB of FP8 and BF16 are 1.37 TB.
    assert 1.3e12 < summary["disk_needed_bytes"] < 1.4e12
    assert ran.cpu_seconds < SECONDS * max(1.0, reference())
    assert 1_000_000 < ran.peak_bytes < BYTES
