"""A LoRA for llama.cpp holds what PEFT's layers add, under llama.cpp's names and in its order of rows.

Where llama.cpp has a row is written here a second time, with the formulas of its own converters (``conversion/*.py``)
on the whole ΔW, and in no line of the code under test. llama.cpp itself is not needed: its rule for the scale is
that of ``llama_adapter_lora_weight::get_scale`` (src/llama-adapter.h), α of the file over r of the tensor.
"""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_merge.cli import exits
from lora_merge.conversion.lora import Lora, LoraModule, Made, Unchanged
from lora_merge.conversion.writers.gguf import GGUF_FILE, check_gguf, write_gguf
from lora_merge.conversion.writers.gguf.families import FAMILIES
from lora_merge.core.tensor import TORCH_CODES, TensorRef
from lora_merge.errors import ConvertError, WriteError
from lora_merge.storage.folder import Folder
from tests.conftest import COMMON, VOCAB
from tests.tampering import edit_json, edit_tensors

gguf = pytest.importorskip("gguf")

TOLERANCE = 1e-6
"""Of the largest element of ΔW: at most s · B, · r/α and · α/r are rounded to float32, half of 2⁻²³ each time; the
products here are in float64."""

N_HEADS, N_KV = COMMON["num_attention_heads"], COMMON["num_key_value_heads"]
UNTIED = {**COMMON, "tie_word_embeddings": False}
VISION = {"depth": 1, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}

Pieces = Callable[[Any], "dict[str, Any]"]
"""ΔW of a module in transformers → of each weight of llama.cpp that it is."""


# Where llama.cpp's converters put a weight.


def permuted(name: str, n_heads: int, w: Any) -> dict[str, Any]:
    """``LlamaModel.permute``."""
    halves = w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, *w.shape[1:])
    return {name: halves.swapaxes(1, 2).reshape(w.shape)}


def regrouped(w: Any) -> dict[str, Any]:
    """``GPTNeoXModel.modify_tensors``: q, k and v of each head → all q, all k, all v."""
    import torch

    qkv = w.reshape(N_HEADS, 3, w.shape[0] // N_HEADS // 3, w.shape[1])
    return {"attn_qkv": torch.cat([qkv[:, part].reshape(-1, w.shape[1]) for part in range(3)])}


def parted(w: Any) -> dict[str, Any]:
    """``InternLM2Model.modify_tensors``: each key head follows its query heads, its value head follows it."""
    groups = w.reshape(N_KV, N_HEADS // N_KV + 2, -1, w.shape[1])
    q, k, v = (part.reshape(-1, w.shape[1]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1]))
    return {**permuted("attn_q", N_HEADS, q), **permuted("attn_k", N_KV, k), "attn_v": v}


def halved(kind: str, w: Any) -> dict[str, Any]:
    """``GraniteMoeModel.modify_tensors``, and how transformers fuses experts: gate, then up."""
    gate, up = w.chunk(2, dim=-2)
    return {f"ffn_gate_{kind}": gate, f"ffn_up_{kind}": up}


def interleaved(w: Any) -> dict[str, Any]:
    """``GptOssModel.modify_tensors``: gate and up by turns."""
    return {"ffn_gate_exps": w[..., ::2, :], "ffn_up_exps": w[..., 1::2, :]}


def multiplied(name: str, factor: float, w: Any) -> dict[str, Any]:
    """``FalconH1Model.modify_tensors``."""
    return {name: w * factor}


def multiplied_in_parts(w: Any) -> dict[str, Any]:
    """``FalconH1Model.modify_tensors``, of ``in_proj``."""
    w = w * HYBRID["ssm_in_multiplier"]
    n_inner, n_state = HYBRID["mamba_d_ssm"], HYBRID["mamba_n_groups"] * HYBRID["mamba_d_state"]
    sizes = [n_inner, n_inner, n_state, n_state, HYBRID["mamba_n_heads"]]
    for part, factor in zip(w.split(sizes), HYBRID["ssm_multipliers"], strict=True):
        part.mul_(factor)
    return {"ssm_in": w}


HYBRID = {
    "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "attention_in_multiplier": 0.5, "attention_out_multiplier": 0.7, "ssm_in_multiplier": 0.9, "ssm_out_multiplier": 1.1,
    "mlp_multipliers": [0.8, 1.2], "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "key_multiplier": 0.6,
    "embedding_multiplier": 1.3, "lm_head_multiplier": 0.4,
}  # fmt: skip

ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
TURNED = {
    "self_attn.q_proj": partial(permuted, "attn_q", N_HEADS),
    "self_attn.k_proj": partial(permuted, "attn_k", N_KV),
}
DENSE = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
EXPERTS = {
    "mlp.gate.weight": "ffn_gate_inp",
    "mlp.experts.gate_up_proj": partial(halved, "exps"),
    "mlp.experts.down_proj": "ffn_down_exps",
}
MIXTURE = {"num_experts_per_tok": 2, "head_dim": 16}


@dataclass(frozen=True)
class Model:
    """A tiny model, and where llama.cpp has the weights of its blocks."""

    architecture: str
    config: str
    fields: Mapping[str, Any]
    arch: str
    places: Mapping[str, str | Pieces]
    parameters: tuple[str, ...] = ()
    """Of ``target_parameters``: those of experts, and routers that are no ``nn.Linear``."""

    ends: bool = True
    """True where the embeddings have LoRA too."""

    end_factors: tuple[float, float] = (1.0, 1.0)
    auto: str = "AutoModelForCausalLM"


MODELS: Mapping[str, Model] = {
    "llama": Model("LlamaForCausalLM", "LlamaConfig", UNTIED, "llama", {**ATTENTION, **TURNED, **DENSE}),
    "llama_tied": Model("LlamaForCausalLM", "LlamaConfig", {**COMMON, "tie_word_embeddings": True}, "llama", {**ATTENTION, **TURNED, **DENSE}, ends=False),
    "qwen2": Model("Qwen2ForCausalLM", "Qwen2Config", UNTIED, "qwen2", {**ATTENTION, **DENSE}),
    "phi3": Model("Phi3ForCausalLM", "Phi3Config", {**UNTIED, "pad_token_id": 0}, "phi3", {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}),
    "gpt2": Model("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}, "gpt2", {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}, ends=False),
    "gpt_neox": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", {key: value for key, value in UNTIED.items() if key != "num_key_value_heads"}, "gptneox", {"attention.query_key_value": regrouped, "attention.dense": "attn_output", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"}),
    "mixtral": Model("MixtralForCausalLM", "MixtralConfig", {**UNTIED, **MIXTURE, "num_local_experts": 4}, "llama", {**ATTENTION, **TURNED, **EXPERTS}, ("gate_up_proj", "down_proj", "gate.weight")),
    "qwen3_moe": Model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**UNTIED, **MIXTURE, "num_experts": 4, "moe_intermediate_size": 48}, "qwen3moe", {**ATTENTION, **EXPERTS}, ("gate_up_proj", "down_proj", "gate.weight")),
    "gpt_oss": Model("GptOssForCausalLM", "GptOssConfig", {**UNTIED, **MIXTURE, "num_local_experts": 4, "sliding_window": 8}, "gpt-oss", {**ATTENTION, "mlp.router.weight": "ffn_gate_inp", "mlp.experts.gate_up_proj": interleaved, "mlp.experts.down_proj": "ffn_down_exps"}, ("gate_up_proj", "down_proj", "router.weight")),
    "granitemoeshared": Model("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", {**UNTIED, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48}, "granitemoe", {**ATTENTION, **TURNED, "block_sparse_moe.router.weight": "ffn_gate_inp", "block_sparse_moe.experts.gate_up_proj": partial(halved, "exps"), "block_sparse_moe.experts.down_proj": "ffn_down_exps", "shared_mlp.input_linear": partial(halved, "shexp"), "shared_mlp.output_linear": "ffn_down_shexp"}, ("gate_up_proj", "down_proj", "router.weight")),
    "falcon_h1": Model("FalconH1ForCausalLM", "FalconH1Config", {**UNTIED, **HYBRID}, "falcon-h1", {"self_attn.q_proj": partial(multiplied, "attn_q", 0.5), "self_attn.k_proj": partial(multiplied, "attn_k", 0.6 * 0.5), "self_attn.v_proj": partial(multiplied, "attn_v", 0.5), "self_attn.o_proj": partial(multiplied, "attn_output", 0.7), "feed_forward.gate_proj": partial(multiplied, "ffn_gate", 0.8), "feed_forward.up_proj": "ffn_up", "feed_forward.down_proj": partial(multiplied, "ffn_down", 1.2), "mamba.in_proj": multiplied_in_parts}, end_factors=(1.3, 0.4)),
    "qwen2_5_vl": Model("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", {"text_config": {**UNTIED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}, "vision_config": VISION, "tie_word_embeddings": False}, "qwen2vl", {**ATTENTION, **DENSE}, auto="AutoModelForImageTextToText"),
    "mistral3": Model("Mistral3ForConditionalGeneration", "Mistral3Config", {"text_config": {**UNTIED, "model_type": "mistral"}, "vision_config": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}, "tie_word_embeddings": False}, "mistral3", {**ATTENTION, **TURNED, **DENSE}, auto="AutoModelForImageTextToText"),
    "gemma": Model("GemmaForCausalLM", "GemmaConfig", {**COMMON, "head_dim": 16}, "gemma", {**ATTENTION, **DENSE}, ends=False),
    "deepseek_v3": Model("DeepseekV3ForCausalLM", "DeepseekV3Config", {**UNTIED, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}, "deepseek2", {"self_attn.o_proj": "attn_output"}),
    "olmo": Model("OlmoForCausalLM", "OlmoConfig", UNTIED, "olmo", ATTENTION),
}  # fmt: skip

WRITTEN = [name for name in MODELS if name not in {"gemma", "deepseek_v3", "olmo"}]
INPUTS = {"embed_tokens", "embed_in", "wte"}


@dataclass(frozen=True)
class Trained:
    """An adapter, and what PEFT's own layers say that it adds."""

    base: Path
    adapter: Path
    deltas: Mapping[str, Any]
    """ΔW in float64, by the path of the module or the parameter: ``[out, in]``, ``[experts, out, in]``."""


@pytest.fixture(scope="session")
def model_of(tmp_path_factory):
    """Return a function: name of a model → directory of a base with random weights."""
    built: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in built:
            import torch
            import transformers

            model = MODELS[name]
            torch.manual_seed(sum(name.encode()))
            config = getattr(transformers, model.config)(**model.fields)
            built[name] = tmp_path_factory.mktemp(name)
            getattr(transformers, model.architecture)(config).save_pretrained(built[name])
        return built[name]

    return build


@pytest.fixture(scope="session")
def trained(model_of, tmp_path_factory):
    """Return a function: name of a model, dtype, fields of `LoraConfig` → an adapter that PEFT made for it."""
    built: dict[str, Trained] = {}

    def build(name: str, dtype: str = "float32", **fields: Any) -> Trained:
        key = json.dumps([name, dtype, fields], sort_keys=True)
        if key not in built:
            import torch
            import transformers
            from peft import LoraConfig, get_peft_model

            base = model_of(name)
            loaded = getattr(transformers, MODELS[name].auto).from_pretrained(base, dtype=torch.float32)
            fields = {"r": 4, "lora_alpha": 6, **fields}
            peft_model = get_peft_model(loaded, LoraConfig(**fields), autocast_adapter_dtype=False)
            torch.manual_seed(7)
            with torch.no_grad():
                for path, parameter in peft_model.named_parameters():
                    if "lora_" in path:
                        parameter.copy_((torch.randn(parameter.shape) * 0.3).to(getattr(torch, dtype)))
            root = tmp_path_factory.mktemp("adapter")
            peft_model.peft_config["default"].base_model_name_or_path = str(base)
            peft_model.save_pretrained(root, save_embedding_layers=False)
            edit_tensors(root / "adapter_model.safetensors", partial(cast, getattr(torch, dtype)))
            built[key] = Trained(base, root, deltas_of(peft_model.double()))
        return built[key]

    return build


def cast(dtype: Any, tensors: dict[str, Any]) -> None:
    tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}


def deltas_of(peft_model: Any) -> dict[str, Any]:
    """Return what the layers of a model say that they add; Conv1D's lies the other way round."""
    deltas = {}
    for path, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach()
            parameter = getattr(module, "parameter_name", None)
            name = path.replace(".base_layer", "")
            if delta.dim() == 3 and peft_model.base_model.model.config.model_type == "gpt_oss":
                delta = delta.mT  # transformers has [experts, in, out]
            is_turned = getattr(module, "fan_in_fan_out", False)
            deltas[f"{name}.{parameter}" if parameter else name] = delta.T if is_turned else delta
    return deltas


def every_module(name: str) -> dict[str, Any]:
    """Return the fields of a `LoraConfig` for everything that llama.cpp has LoRA for."""
    model = MODELS[name]
    ends = [end for end in model.places if end.rpartition(".")[2] not in {*model.parameters, "weight"}]
    pattern = "|".join(re.escape(end) for end in ends)
    edges = r"|(.*\.)?(embed_tokens|embed_in|lm_head|embed_out)" if model.ends else ""
    fields: dict[str, Any] = {"target_modules": rf"(?!.*visi).*\.(layers|h)\.\d+\.({pattern}){edges}"}
    if model.parameters:
        fields["target_parameters"] = list(model.parameters)
    return fields


def expected(name: str, deltas: Mapping[str, Any]) -> dict[str, Any]:
    """Return ΔW of every weight of llama.cpp."""
    model = MODELS[name]
    found = {}
    for path, delta in deltas.items():
        match = re.search(r"(?:layers|h)\.(\d+)\.(.+)", path)
        if match is None:
            is_input = path.rpartition(".")[2] in INPUTS
            factor = model.end_factors[0 if is_input else 1]
            found["token_embd.weight" if is_input else "output.weight"] = delta * factor
            continue
        place = model.places[match[2]]
        pieces = {place: delta} if isinstance(place, str) else place(delta)
        found |= {f"blk.{match[1]}.{end}.weight": piece for end, piece in pieces.items()}
    return found


# What is in a file, read with gguf's own reader.


@dataclass(frozen=True)
class Found:
    """What llama.cpp makes of a file."""

    keys: Mapping[str, Any]
    deltas: Mapping[str, Any]
    """By the name of the weight: what it adds, in float64."""

    dtypes: Mapping[str, str]
    """By the name of the tensor."""

    ranks: Mapping[str, int]


def read(path: Path) -> Found:
    import torch

    reader = gguf.GGUFReader(path)
    keys = {name: value.contents() for name, value in reader.fields.items() if not name.startswith("GGUF.")}
    values, dtypes = {}, {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        raw = torch.from_numpy(tensor.data.copy())
        as_stored = raw.view(torch.bfloat16) if tensor.tensor_type.name == "BF16" else raw
        values[tensor.name], dtypes[tensor.name] = as_stored.reshape(shape).double(), tensor.tensor_type.name
    names = {name.rpartition(".lora_")[0] for name in values}
    assert values.keys() == {f"{name}.lora_{end}" for name in names for end in "ab"}
    deltas, ranks = {}, {}
    for name in names:
        a, b = values[f"{name}.lora_a"], values[f"{name}.lora_b"]
        ranks[name] = b.shape[-1]
        # build_inp_embd looks tokens up in A, [vocabulary, r], and multiplies with B
        product = a @ b.mT if name == "token_embd.weight" else b @ a
        deltas[name] = product * keys["adapter.lora.alpha"] / ranks[name]
    return Found(keys, deltas, dtypes, ranks)


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert found[name].shape == delta.shape, name
        off = float((found[name] - delta).abs().max())
        assert off <= TOLERANCE * float(delta.abs().max()), (name, off)


@pytest.fixture
def converted(cli, tmp_path):
    """Return a function: base, adapter, options → what the command wrote."""

    def convert(base: Path, adapter: Path, *options: object) -> Found:
        out = tmp_path / "out"
        result = cli("convert", adapter, "--format", "gguf", "--base", base, "--out", out, "-q", *options)
        assert result.exit_code == 0, result.output
        return read(out / GGUF_FILE)

    return convert


# The tests.


@pytest.mark.parametrize("name", WRITTEN)
def test_every_module_is_where_llama_cpp_looks_for_it(name, trained, converted):
    made = trained(name, **every_module(name))
    found = converted(made.base, made.adapter)
    wanted = expected(name, made.deltas)
    n_ends = sum(not name.startswith("blk.") for name in wanted)
    assert (len(made.deltas) - n_ends, n_ends) == (2 * len(MODELS[name].places), 2 * MODELS[name].ends)
    assert_same(found.deltas, wanted)
    assert found.keys["general.architecture"] == MODELS[name].arch


def test_rslora_ranks_and_alphas_of_their_own_are_all_in_b(trained, converted):
    made = trained(
        "llama",
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"k_proj": 3, r"layers\.1\..*down_proj": 7},
        alpha_pattern={"v_proj": 5, r"layers\.0\..*q_proj": 40},
    )
    found = converted(made.base, made.adapter)
    assert_same(found.deltas, expected("llama", made.deltas))
    assert set(found.ranks.values()) == {3, 4, 7}
    assert found.keys["adapter.lora.alpha"] == 4


def test_an_alpha_of_zero_adds_nothing(trained, converted):
    made = trained("llama", target_modules=["q_proj"], alpha_pattern={"q_proj": 0})
    found = converted(made.base, made.adapter)
    assert found.keys["adapter.lora.alpha"] == 4  # llama.cpp takes an α of 0 for a scale of 1
    assert all(not delta.any() for delta in found.deltas.values())


def test_the_keys_are_those_that_llama_cpp_asks_for(trained, converted):
    made = trained("qwen2", target_modules=["q_proj"])
    assert converted(made.base, made.adapter).keys == {
        "general.architecture": "qwen2",
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.name": made.base.name,
        "adapter.lora.alpha": 4.0,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


@pytest.mark.parametrize(
    ("dtype", "alpha", "stored"),
    [
        ("bfloat16", 8, "BF16"), ("float16", 8, "F16"), ("float32", 8, "F32"), ("bfloat16", 6, "F32"),
        ("float16", 6, "F32"),
    ],
)  # fmt: skip
def test_the_dtype_stays_where_it_holds_the_scaled_factors(dtype, alpha, stored, trained, converted):
    made = trained("llama", dtype, target_modules=["q_proj", "down_proj"], lora_alpha=alpha)
    found = converted(made.base, made.adapter)
    assert set(found.dtypes.values()) == {stored}
    assert_same(found.deltas, expected("llama", made.deltas))


@pytest.mark.parametrize(
    ("dtype", "rank", "stored"), [("bfloat16", 8, "BF16"), ("bfloat16", 6, "F32"), ("float16", 8, "F32")]
)
def test_another_rank_has_a_dtype_that_holds_what_alpha_makes_of_it(dtype, rank, stored, trained, converted):
    fields = {"lora_alpha": 4, "rank_pattern": {"v_proj": rank}, "alpha_pattern": {"v_proj": rank}}
    made = trained("llama", dtype, target_modules=["q_proj", "k_proj", "v_proj"], **fields)
    found = converted(made.base, made.adapter)
    assert found.keys["adapter.lora.alpha"] == 4
    plain = {"bfloat16": "BF16", "float16": "F16"}[dtype]
    by_kind = {
        name: {own for weight, own in found.dtypes.items() if name in weight} for name in ("attn_q", "attn_v")
    }
    assert by_kind == {"attn_q": {plain}, "attn_v": {stored}}
    assert_same(found.deltas, expected("llama", made.deltas))


# Adapters that are written by hand: nothing computes with these names today.


def by_hand(root: Path, base: Path, shapes: Mapping[str, tuple[int, int]], rank: Callable[[str], int], **config: Any) -> Trained:  # fmt: skip
    """Write an adapter with random factors for modules ``[out, in]``; α is 6."""
    import torch
    from safetensors.torch import save_file

    generator, tensors, deltas = torch.Generator().manual_seed(3), {}, {}
    for path, (n_out, n_in) in shapes.items():
        r = rank(path)
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((r, n_in), (n_out, r)))
        name = f"base_model.model.{path}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        deltas[path] = b.double() @ a.double() * (6 / r)
    root.mkdir()
    save_file(tensors, root / "adapter_model.safetensors", {"format": "pt"})
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": sorted(shapes), **config}
    (root / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": str(base)}))
    return Trained(base, root, deltas)


def test_experts_one_by_one_are_stacked_with_zeros_where_there_is_nothing(model_of, converted, tmp_path):
    import torch

    n, shapes = COMMON["intermediate_size"], {}
    for expert in (0, 1, 3):
        path = f"model.layers.1.block_sparse_moe.experts.{expert}"
        shapes |= {f"{path}.w1": (n, 64), f"{path}.w2": (64, n), f"{path}.w3": (n, 64)}
    adapter = by_hand(
        tmp_path / "adapter", model_of("mixtral"), shapes, lambda path: 3 if ".experts.1." in path else 4,
        rank_pattern={r".*\.experts\.1\..*": 3},
    )  # fmt: skip
    found = converted(adapter.base, adapter.adapter)
    wanted = {}
    for end, name in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        path = "model.layers.1.block_sparse_moe.experts"
        missing = torch.zeros(shapes[f"{path}.0.{end}"], dtype=torch.float64)
        deltas = [adapter.deltas.get(f"{path}.{expert}.{end}", missing) for expert in range(4)]
        wanted[f"blk.1.ffn_{name}_exps.weight"] = torch.stack(deltas)
    assert_same(found.deltas, wanted)
    assert all(not delta[2].any() for delta in found.deltas.values())
    assert set(found.ranks.values()) == {4}


def test_internlm2s_one_matrix_is_three_weights(converted, tmp_path):
    import torch
    from safetensors.torch import save_file

    base = tmp_path / "base"
    base.mkdir()
    rows = 16 * (N_HEADS + 2 * N_KV)
    paths = {f"model.layers.{n}.attention.wqkv": (rows, 64) for n in range(2)}
    weights = {f"{path}.weight": torch.zeros(shape) for path, shape in paths.items()}
    weights |= {
        "model.tok_embeddings.weight": torch.zeros(VOCAB, 64),
        "output.weight": torch.zeros(VOCAB, 64),
    }
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    config = {**UNTIED, "model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    shapes = {**paths, "output": (VOCAB, 64)}
    adapter = by_hand(tmp_path / "adapter", base, shapes, lambda _: 4)
    wanted = {
        f"blk.{n}.{end}.weight": piece
        for n, path in enumerate(paths)
        for end, piece in parted(adapter.deltas[path]).items()
    }
    assert_same(
        converted(base, adapter.adapter).deltas, {**wanted, "output.weight": adapter.deltas["output"]}
    )


# What is refused.


@dataclass(frozen=True)
class Refusal:
    """An adapter that llama.cpp cannot have, and what is said of it."""

    name: str
    model: str
    says: str
    fields: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    """What is changed in the base's ``config.json``, once the adapter is made."""


REFUSALS = (
    Refusal("DoRA", "llama", "self_attn.q_proj: has DoRA, which the format gguf", {"target_modules": ["q_proj"], "use_dora": True}),
    Refusal("whole modules", "llama", "is saved whole, which the format gguf cannot hold", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    Refusal("the input of tied embeddings", "llama_tied", "model.embed_tokens: is one end of tied embeddings", {"target_modules": ["embed_tokens", "q_proj"]}),
    Refusal("the output of tied embeddings", "llama_tied", "lm_head: is one end of tied embeddings", {"target_modules": ["lm_head", "q_proj"]}),
    Refusal("embeddings that are tied unless config.json says otherwise", "gpt2", "transformer.wte: is one end of tied embeddings", {"target_modules": ["wte"]}, {"tie_word_embeddings": ...}),
    Refusal("learned positions", "gpt2", "transformer.wpe: is a wpe, which llama.cpp loads and does not apply", {"target_modules": ["wpe", "c_attn"]}),
    Refusal("the output of a Gemma", "gemma", "lm_head: is a lm_head, which llama.cpp's graph of this family does not have", {"target_modules": ["lm_head"]}),
    Refusal("latent attention", "deepseek_v3", "model.layers.0.self_attn.q_b_proj: is a q_b_proj, which llama.cpp loads and does not apply", {"target_modules": ["q_b_proj", "o_proj"]}),
    Refusal("a vision tower", "qwen2_5_vl", "model.visual.blocks.0.attn.proj: is not part of the text model", {"target_modules": ["visual.blocks.0.attn.proj", "q_proj"]}),
    Refusal("a parameter that lies the other way round", "gpt2", "transformer.h.0.attn.c_attn.weight: is LoRA on a parameter that llama.cpp stores transposed", {"target_modules": [], "target_parameters": ["attn.c_attn.weight"]}),
    Refusal("a family that is not known", "olmo", "model_type: is 'olmo', a family for which LoRA in llama.cpp is not supported here", {"target_modules": ["q_proj"]}),
    Refusal("a family inside of one that is not known", "mistral3", "model_type: is 'mistral' inside of 'llava', a family for which LoRA", {"target_modules": ["self_attn.q_proj"]}, {"model_type": "llava"}),
)  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_what_llama_cpp_would_get_wrong_is_refused_and_nothing_is_written(case, trained, cli, tmp_path):
    made = trained(case.model, **case.fields)
    base = shutil.copytree(made.base, tmp_path / "base")
    edit_json(base / "config.json", **case.config)
    result = cli("convert", made.adapter, "--format", "gguf", "--base", base, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN, result.output
    assert case.says in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_without_the_package_the_hint_says_how_to_install_it(trained, cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # what Python itself does with a package that is not there
    made = trained("qwen2", target_modules=["q_proj"])
    result = cli("convert", made.adapter, "--format", "gguf", "--base", made.base, "--out", tmp_path / "out")
    assert result.exit_code == exits.USAGE
    assert "gguf needs the package gguf, which is not installed" in " ".join(result.output.split())
    assert 'pip install "lora-merge[gguf]"' in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_every_family_is_one_of_ggufs_architectures():
    assert {family.arch for family in FAMILIES.values()} <= set(gguf.MODEL_ARCH_NAMES.values())


# The writer by itself, on a LoRA that needs no model.


def small(*paths: str, rank: int = 4) -> tuple[Lora, Callable[[Made], tuple[Any, Any]]]:
    """Return a LoRA of a Llama with one layer, and what loads its factors."""
    import torch

    factors = {path: (torch.randn(rank, 64), torch.randn(64, rank)) for path in paths}

    def ref(tensor: Any) -> TensorRef:
        return TensorRef("", TORCH_CODES[str(tensor.dtype)], tuple(tensor.shape), "", 0, 0)

    made = tuple(
        Made(LoraModule(path, "linear", Unchanged(), (64, 64), rank), ref(a), ref(b), 1.0, None)
        for path, (a, b) in factors.items()
    )
    config = {"model_type": "llama", "num_hidden_layers": 1, "num_attention_heads": 4}
    return Lora(made, {}, base_config=config), lambda one: factors[one.module.path]


def test_a_written_file_is_checked_value_by_value(tmp_path):
    paths = ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj")
    lora, factors = small(*paths)
    write_gguf(Folder.of(tmp_path), lora, factors)
    assert check_gguf(tmp_path, lora, factors) == []
    both = factors(lora.made[0])
    for tensor in both:
        tensor[1, 2] += 1e-5 * tensor.abs().max()
        (issue,) = check_gguf(tmp_path, lora, factors)
        assert (issue.code, issue.subject) == ("differs", "blk.0.attn_v.weight")
        tensor[1, 2] -= 1e-5 * tensor.abs().max()
    less, _ = small(paths[0])
    codes = [(issue.code, issue.subject) for issue in check_gguf(tmp_path, less, factors)]
    assert codes == [("surplus", f"blk.0.attn_output.weight.lora_{end}") for end in "ab"]
    more, more_factors = small(*paths, "model.layers.0.self_attn.q_proj")
    codes = [issue.code for issue in check_gguf(tmp_path, more, more_factors)]
    assert codes == ["differs", "differs", "missing"]


def test_a_file_that_was_cut_short_is_no_traceback(tmp_path):
    lora, factors = small("model.layers.0.self_attn.v_proj")
    write_gguf(Folder.of(tmp_path), lora, factors)
    file = tmp_path / GGUF_FILE
    file.write_bytes(file.read_bytes()[:-64])
    (issue,) = check_gguf(tmp_path, lora, factors)
    assert (issue.code, issue.subject) == ("unreadable", GGUF_FILE)


def test_a_disk_that_is_full_before_the_last_byte_is_noticed(tmp_path):
    lora, factors = small("model.layers.0.self_attn.v_proj")
    write_gguf(Folder.of(tmp_path), lora, factors)
    nbytes = (tmp_path / GGUF_FILE).stat().st_size
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes - 1, unlimited[1]))
    try:
        with pytest.raises(WriteError, match=rf"{GGUF_FILE}: cannot be written"):
            write_gguf(Folder.of(tmp_path), lora, factors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_two_modules_cannot_be_one_weight(tmp_path):
    lora, factors = small("model.layers.0.self_attn.v_proj", "layers.0.attention.wv")
    with pytest.raises(ConvertError, match=r"blk\.0\.attn_v\.weight: has LoRA of several modules"):
        write_gguf(Folder.of(tmp_path), lora, factors)
    assert not list(tmp_path.iterdir())
