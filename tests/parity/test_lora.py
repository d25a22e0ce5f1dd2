"""The oracle suite: what the command writes against base + adapter in PEFT, and against PEFT's merge."""

from __future__ import annotations

import json

import pytest
import torch

from tests.crossing import diagonal
from tests.tampering import edit_json, edit_tensors

DTYPES = ("bfloat16", "float16", "float32")

LLAMA_KINDS = {
    "list": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "regex": {"target_modules": r"^(?!.*layers\.1\.mlp).*\.(q_proj|v_proj|down_proj)$"},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["k_proj", "up_proj"], "use_rslora": True, "r": 5},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.gate_proj": 7},
        "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 16, r"layers\.\d+\.self_attn\.k_proj": 1},
    },
    "layers": {
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "exclude_list": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "exclude_modules": ["layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
    },
    "exclude_regex": {
        "target_modules": "all-linear",
        "exclude_modules": r".*layers\.0\.(self_attn|mlp\.up).*",
    },
}
GPT2_KINDS = {
    "list": {"target_modules": ["c_attn", "c_proj"]},
    "regex": {"target_modules": r"^(?!.*h\.1\.mlp).*\.(c_attn|c_proj|c_fc)$"},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["c_attn", "c_fc"], "use_rslora": True, "r": 5},
    "patterns": {
        "target_modules": ["c_attn", "c_proj", "c_fc"],
        "rank_pattern": {"attn.c_proj": 2, r"h\.1\.mlp\.c_fc": 7},
        "alpha_pattern": {"^transformer.h.0.attn.c_attn": 16, r"h\.\d+\.mlp\.c_proj": 1},
    },
    "layers": {"target_modules": ["c_attn", "c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    "exclude_list": {
        "target_modules": ["c_attn", "c_proj"],
        "exclude_modules": ["mlp.c_proj", "h.0.attn.c_attn"],
    },
    "square": {"target_modules": ["attn.c_proj"]},
}
PATHS_OF_SOME_LAYERS = {
    "target_modules": ["q_proj", "0.mlp.up_proj", "1.mlp.up_proj"],
    "layers_to_transform": [1],
}
KINDS = {
    "llama": {**LLAMA_KINDS, "paths_of_some_layers": PATHS_OF_SOME_LAYERS},
    "llama_tied": LLAMA_KINDS,
    "qwen2": LLAMA_KINDS,
    "gpt2": GPT2_KINDS,
}
CASES = [
    pytest.param(family, fields, id=f"{family}-{kind}")
    for family, kinds in KINDS.items()
    for kind, fields in kinds.items()
]

# Merged and unmerged compute x·(W + sBA)ᵀ and x·Wᵀ + s·(x·Aᵀ)·Bᵀ in float32: the same sums in another order,
# after one more rounding of the weight. A sum of n terms in another order is off by about √n·2⁻²⁴ of its size,
# at most √256·2⁻²⁴ ≈ 1e-6 here (no inner dimension is larger than 256). Ten such products lie one after the
# other between the tokens and the logits, and each adds its own: 1e-5 of the largest logit.
FLOAT32_TOLERANCE = 1e-5

# The adapters are drawn so that they matter: they change the logits as much as the base makes them.
LEAST_EFFECT = 0.5


def assert_same_bytes(got, wanted):
    """Every tensor has the name, dtype, shape and bytes that it should; which ones differ is the message."""
    assert sorted(got) == sorted(wanted)
    assert [name for name in wanted if got[name] != wanted[name]] == []


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_the_merged_model_computes_what_base_and_adapter_compute(
    family, fields, pico, pico_adapter, merged, load, logits
):
    from peft import PeftModel

    base = pico(family, "float32")
    adapter = pico_adapter(base, **fields)
    plain = logits(load(base))
    wanted = logits(PeftModel.from_pretrained(load(base), adapter))
    got = logits(load(merged(base, adapter)))
    largest = wanted.abs().max()
    assert (wanted - plain).abs().max() > LEAST_EFFECT * largest
    assert (got - wanted).abs().max() <= FLOAT32_TOLERANCE * largest


@pytest.mark.parametrize(("family", "fields", "dtype"), diagonal(CASES, DTYPES))
def test_every_tensor_has_the_bits_of_pefts_merge_or_of_the_base(
    family, fields, dtype, pico, pico_adapter, results, stored
):
    base = pico(family, dtype)
    found = results(base, pico_adapter(pico(family, "float32"), **fields))
    assert_same_bytes(found.ours, found.by_peft)
    changed = {name for name, before in stored(base).items() if found.ours[name] != before}
    assert changed == found.touched
    assert changed


@pytest.mark.parametrize("adapter_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_stored_in_half_precision_is_widened_before_it_is_multiplied(
    dtype, adapter_dtype, pico, pico_adapter, tampered, results
):
    base = pico("llama", dtype)
    adapter = tampered(pico_adapter(pico("llama", "float32"), **LLAMA_KINDS["patterns"]))

    def halve(tensors):
        for name in tensors:
            tensors[name] = tensors[name].to(getattr(torch, adapter_dtype))

    edit_tensors(adapter / "adapter_model.safetensors", halve)
    found = results(base, adapter)
    assert_same_bytes(found.ours, found.by_peft)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_square_conv1d_weight_is_merged_transposed_whatever_the_config_says(
    dtype, fan_in_fan_out, pico, pico_adapter, tampered, results
):
    base = pico("gpt2", dtype)
    adapter = tampered(pico_adapter(pico("gpt2", "float32"), **GPT2_KINDS["square"]))
    edit_json(adapter / "adapter_config.json", fan_in_fan_out=fan_in_fan_out)
    found = results(base, adapter)
    assert {found.ours[name].shape for name in found.touched} == {(64, 64)}
    assert_same_bytes(found.ours, found.by_peft)


@pytest.fixture
def untied_gpt2(tmp_path):
    """A GPT-2 whose output embedding is its own: Conv1D and Linear layers side by side."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=64, n_positions=64, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def without_base_layers(adapter):
    """Take out the full embeddings that PEFT saves beside a LoRA on an embedding."""

    def drop(tensors):
        for name in [name for name in tensors if ".base_layer." in name]:
            del tensors[name]

    edit_tensors(adapter / "adapter_model.safetensors", drop)
    return adapter


def test_a_square_conv1d_and_a_square_linear_in_one_adapter_are_told_apart(
    untied_gpt2, pico_adapter, tampered, results
):
    made = pico_adapter(untied_gpt2, target_modules=["attn.c_proj", "lm_head"])
    found = results(untied_gpt2, without_base_layers(tampered(made)))
    assert found.touched == {"transformer.h.0.attn.c_proj.weight", "lm_head.weight"}
    assert {found.ours[name].shape for name in found.touched} == {(64, 64)}
    assert_same_bytes(found.ours, found.by_peft)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_output_embedding_that_is_not_tied_is_merged(family, dtype, pico, pico_adapter, tampered, results):
    made = pico_adapter(pico(family, "float32"), target_modules=["q_proj", "lm_head"])
    found = results(pico(family, dtype), without_base_layers(tampered(made)))
    assert "lm_head.weight" in found.touched
    assert_same_bytes(found.ours, found.by_peft)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_output_embedding_is_merged_from_the_file_that_peft_saves_by_default(
    family, pico, pico_adapter, results, stored
):
    base = pico(family)
    adapter = pico_adapter(base, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in stored(adapter)  # the base's own, saved again
    found = results(base, adapter)
    assert_same_bytes(found.ours, found.by_peft)


def header_order(path):
    """Return the file's tensors in the order of their bytes."""
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__")
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def test_a_sharded_base_keeps_its_shards_names_and_order(
    pico, pico_adapter, merged, peft_merge, stored, load
):
    base = pico("llama", "bfloat16", "20KB")
    adapter = pico_adapter(base)
    by_peft, out = peft_merge(base, adapter), merged(base, adapter)
    shards = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(shards) > 3
    assert sorted(path.name for path in out.glob("*.safetensors")) == shards
    for shard in shards:
        assert header_order(out / shard) == header_order(base / shard)
    index = "model.safetensors.index.json"
    weight_maps = [json.loads((root / index).read_text())["weight_map"] for root in (base, out)]
    assert weight_maps[0] == weight_maps[1]
    assert_same_bytes(stored(out), stored(by_peft.root))
    assert load(out).num_parameters() == load(base).num_parameters()


@pytest.mark.parametrize("target", ["float32", "float16"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_another_dtype_is_the_float32_merge_rounded_once(
    family, target, pico, pico_adapter, merged, peft_merge, load
):
    from safetensors.torch import load_file

    base = pico(family, "bfloat16")
    adapter = pico_adapter(base, target_modules="all-linear")
    out = merged(base, adapter, "--dtype", target)
    in_float32 = load_file(peft_merge(base, adapter, "float32").root / "model.safetensors")
    got = load_file(out / "model.safetensors")
    assert sorted(got) == sorted(in_float32)
    dtype = getattr(torch, target)
    for name, wanted in in_float32.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], wanted.to(dtype)), name
    config = json.loads((out / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == target
    assert load(out).dtype == dtype


def test_a_limit_on_the_shard_size_moves_tensors_and_changes_none(
    pico, pico_adapter, merged, peft_merge, stored, load
):
    base = pico("llama", "bfloat16")
    adapter = pico_adapter(base)
    out = merged(base, adapter, "--max-shard-size", "30KB")
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 1
    tensors = stored(out)
    assert_same_bytes(tensors, stored(peft_merge(base, adapter).root))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(tensor.raw) for tensor in tensors.values())
    assert sorted(index["weight_map"]) == sorted(tensors)
    for shard in shards:
        assert sum(len(tensor.raw) for tensor in stored_in(shard, tensors)) <= 30_000
        assert all(index["weight_map"][name] == shard.name for name in header_order(shard))
    loaded = load(out).state_dict()
    for name, tensor in tensors.items():
        assert loaded[name].contiguous().view(torch.uint8).numpy().tobytes() == tensor.raw


def stored_in(shard, tensors):
    """Return the tensors that lie in one file."""
    return [tensors[name] for name in header_order(shard)]
