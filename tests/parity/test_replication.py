"""``layer_replication``: adapters that were trained on a base some of whose layers stand in it several times.

PEFT repeats the layers in the model that it is given; the copies share the base's weights, and each has a LoRA of
its own. So its forward pass is right, and its merge, which adds all of them to the one weight, is not. A merged
checkpoint has as many layers as the adapter was trained with, and each its own weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import COMMON
from tests.tampering import edit_json

# Relative to the largest logit. A product over n values adds √n·2⁻²⁴ of its size, here with n ≤ 80. Six lie one
# after the other in a layer (query, scores, values, output, up, down), and with four layers and the head it is 25.
# They are independent, so √25·√80·2⁻²⁴ = 2.7e-6 is expected; the tolerance is four times that.
FLOAT32_TOLERANCE = 1e-5

# A wrong merge is off by about the adapter's effect.
LEAST_EFFECT = 0.05

THREE_LAYERS = {**COMMON, "num_hidden_layers": 3, "tie_word_embeddings": False}
SLIDING = {"head_dim": 16, "sliding_window": 3}
TOKENS = [[1, 17, 5, 80, 33, 9, 62, 2], [1, 94, 3, 3, 41, 28, 70, 11]]

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", THREE_LAYERS),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", {**THREE_LAYERS, "tie_word_embeddings": True}),
    "llama_biased": ("LlamaForCausalLM", "LlamaConfig", {**THREE_LAYERS, "attention_bias": True}),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**THREE_LAYERS, **SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**THREE_LAYERS, **SLIDING}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **THREE_LAYERS,
            **SLIDING,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **THREE_LAYERS, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
            "mlp_only_layers": [1],
        },
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        {
            "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": COMMON["vocab_size"], "max_position_embeddings": 64,
        },
    ),
}  # fmt: skip
PER_LAYER = ("qwen3", "gemma2", "gemma3")
"""Families whose config lists the kind of attention layer by layer."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A base on disk, and an adapter that repeats its layers."""

    family: str
    base: Any
    adapter: Any
    order: tuple[int, ...]
    """The layer of the base that each layer of the output is made from."""


def load(family, directory):
    """Return a checkpoint in transformers, in its own dtype."""
    return getattr(transformers, FAMILIES[family][0]).from_pretrained(directory, dtype="auto").eval()


def compute(model):
    """Return the logits of two fixed prompts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny: handing them to threads takes longer
    try:
        with torch.no_grad():
            return model.eval()(torch.tensor(TOKENS), use_cache=False).logits
    finally:
        torch.set_num_threads(threads)


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def per_layer(values, order):
    """Return a list with one entry per layer for the repeated layers."""
    return [values[layer] for layer in order]


@pytest.fixture(scope="session")
def build_base(tmp_path_factory):
    """Return a function (family, dtype, max_shard_size) → directory of a base with three layers."""
    built = {}

    def build(family, dtype="float32", max_shard_size=None):
        key = (family, dtype, max_shard_size)
        if key not in built:
            architecture, config, fields = FAMILIES[family]
            torch.manual_seed(sum(family.encode()))
            model = getattr(transformers, architecture)(getattr(transformers, config)(**fields))
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0, 0.2)
                    else:
                        parameter.add_(torch.randn_like(parameter) * 0.1)
            root = tmp_path_factory.mktemp(f"{family}-{dtype}")
            sizes = {"max_shard_size": max_shard_size} if max_shard_size else {}
            model.to(getattr(torch, dtype)).save_pretrained(root, **sizes)
            built[key] = root
        return built[key]

    return build


@pytest.fixture
def pair(build_base, tmp_path):
    """Return a function (family, …, LoraConfig fields) → a base and an adapter with random factors."""
    from peft import LoraConfig, get_peft_model

    def build(family="llama", dtype="float32", max_shard_size=None, ranges=((0, 2), (1, 3)), **fields):
        base = build_base(family, dtype, max_shard_size)
        modules = ["query", "value"] if family == "bert" else ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(
            **{
                "r": 4,
                "lora_alpha": 6,
                "target_modules": modules,
                "layer_replication": [list(ends) for ends in ranges],
                **fields,
            }
        )
        torch.manual_seed(3)
        model = get_peft_model(load(family, base), config)
        torch.manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapter = tmp_path / f"adapter-{len(list(tmp_path.iterdir()))}"
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(adapter)
        return Pair(family, base, adapter, tuple(chain.from_iterable(range(*ends) for ends in ranges)))

    return build


def unmerged(pair):
    """Return base + adapter in PEFT, loaded as a user would.

    transformers looks a layer's kind of attention up by its place, in a list that PEFT leaves as long as it was:
    such a model cannot run. It gets the list that it lacks; the layers themselves are PEFT's.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(pair.family, pair.base), pair.adapter).eval()
    if pair.family in PER_LAYER:
        assert model.config.num_hidden_layers == len(pair.order)
        model.config.layer_types = per_layer(model.config.layer_types, pair.order)
    return model


def layers_of(model):
    """Return the list of layers of a model in PEFT."""
    inner = model.base_model.model
    return inner.bert.encoder.layer if hasattr(inner, "bert") else inner.model.layers


LAYERS = {family: "bert.encoder.layer" if family == "bert" else "model.layers" for family in FAMILIES}
"""What the names of a family's layers begin with."""


def origin_of(pair, name):
    """Return the base's name of a tensor of the output."""
    stem = LAYERS[pair.family]
    if not name.startswith(f"{stem}."):
        return name
    layer, _, rest = name[len(stem) + 1 :].partition(".")
    return f"{stem}.{pair.order[int(layer)]}.{rest}"


PLAIN = {}
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.3.mlp.down_proj": 7},
    "alpha_pattern": {r"layers\.[12]\.self_attn\.v_proj": 1},
}
EACH_FAMILY = [(family, PLAIN) for family in FAMILIES if family != "qwen3_moe"]
EACH_KIND = {
    "rsLoRA": {"use_rslora": True},
    "patterns": PATTERNS,
    "DoRA": {"use_dora": True},
    "DoRA_with_patterns": {"use_dora": True, **PATTERNS},
    "all-linear": {"target_modules": "all-linear"},
    "some_of_the_new_layers": {"layers_to_transform": [2, 3]},
    "a_whole_layer_saved": {"modules_to_save": ["layers.3.mlp.up_proj"]},
    "norms_saved": {"modules_to_save": ["norm"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}
every_case = pytest.mark.parametrize(
    ("family", "fields"),
    [
        *(pytest.param(family, fields, id=family) for family, fields in EACH_FAMILY),
        *(pytest.param("llama", fields, id=f"llama-{name}") for name, fields in EACH_KIND.items()),
        pytest.param("llama_biased", {"bias": "lora_only"}, id="llama_biased-bias"),
        pytest.param("llama_tied", EACH_KIND["embedding"], id="llama_tied-embedding"),
        pytest.param("gemma3", {"use_dora": True}, id="gemma3-DoRA"),
    ],
)


@every_case
def test_the_repeated_layers_compute_what_pefts_repeated_layers_compute(family, fields, pair, merged):
    made = pair(family, **fields)
    model = unmerged(made)
    wanted = compute(model)
    with model.disable_adapter():
        assert off_by(compute(model), wanted) > LEAST_EFFECT
    out = merged(made.base, made.adapter, "--verify", "full")
    got = load(family, out)
    assert got.config.num_hidden_layers == len(made.order)
    assert off_by(compute(got), wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3", "bert"])
def test_the_oracle_repeats_weights_and_gives_each_copy_a_lora_of_its_own(family, pair):
    made = pair(family)
    model = unmerged(made)
    copies = layers_of(model)
    assert len(copies) == len(made.order) == 4
    name = "attention.self.query" if family == "bert" else "self_attn.q_proj"
    first, second = (copies[layer].get_submodule(name) for layer in (1, 2))
    assert made.order[1] == made.order[2]
    assert first.base_layer.weight.data_ptr() == second.base_layer.weight.data_ptr()
    assert not torch.equal(first.lora_B["default"].weight, second.lora_B["default"].weight)
    wanted = compute(model)
    assert off_by(compute(model.merge_and_unload()), wanted) > LEAST_EFFECT


@pytest.mark.parametrize(
    "ranges",
    [
        pytest.param(((0, 3),), id="every_layer_once"),
        pytest.param(((0, 3), (2, 3)), id="the_last_one_again"),
        pytest.param(((0, 1), (0, 1), (0, 1), (2, 3)), id="one_three_times_and_one_left_out"),
        pytest.param(((0, 1), (2, 3)), id="one_left_out"),
        pytest.param(((2, 3), (0, 2)), id="another_order"),
        pytest.param(((1, 1), (0, 2)), id="an_empty_range"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_any_order_of_layers_computes_what_it_computes_in_peft(family, ranges, pair, merged):
    made = pair(family, ranges=ranges)
    wanted = compute(unmerged(made))
    out = merged(made.base, made.adapter, "--verify", "full")
    got = load(family, out)
    assert got.config.num_hidden_layers == len(made.order)
    assert off_by(compute(got), wanted) <= FLOAT32_TOLERANCE


def expanded(pair, root):
    """Write the base with its layers repeated, and the adapter as one of that base; return PEFT's merge of them."""
    from peft import PeftModel
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(pair.base.glob("*.safetensors")):
        tensors |= load_file(file)
    config = load(pair.family, pair.base).config
    config.num_hidden_layers = len(pair.order)
    if pair.family in PER_LAYER:
        config.layer_types = per_layer(config.layer_types, pair.order)
    architecture = getattr(transformers, FAMILIES[pair.family][0])
    larger = architecture(config).to(next(iter(tensors.values())).dtype)
    state = {name: tensors[origin_of(pair, name)] for name in larger.state_dict()}
    larger.load_state_dict(state)
    edit_json(pair.adapter / "adapter_config.json", layer_replication=None)
    PeftModel.from_pretrained(larger.eval(), pair.adapter).merge_and_unload().save_pretrained(root)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("family", "fields"), [("llama", PATTERNS), ("llama", {"use_dora": True}), ("gemma3", PLAIN)]
)
def test_every_tensor_has_the_bits_of_pefts_merge_into_a_base_written_out(
    family, fields, dtype, pair, merged, stored, tmp_path
):
    made = pair(family, dtype, **fields)
    ours = stored(merged(made.base, made.adapter, "--verify", "full"))
    expanded(made, tmp_path / "by-peft")
    wanted = stored(tmp_path / "by-peft")
    assert sorted(ours) == sorted(wanted)
    assert [name for name in wanted if ours[name] != wanted[name]] == []


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "bert"])
@pytest.mark.parametrize("max_shard_size", [None, "60KB"], ids=["one_file", "shards"])
def test_a_tensor_that_no_lora_touches_has_the_bytes_of_the_layer_it_repeats(
    family, max_shard_size, pair, merged, stored
):
    made = pair(family, "bfloat16", max_shard_size)
    assert len(list(made.base.glob("*.safetensors"))) == 1 or max_shard_size
    out = merged(made.base, made.adapter, "--verify", "full")
    before, after = stored(made.base), stored(out)
    touched = {f"{module}.weight" for module in unmerged(made).targeted_module_names}
    assert len(touched) == len(made.order) * (2 if family == "bert" else 3)
    in_layers = [name for name in before if name.startswith(f"{LAYERS[family]}.0.")]
    others = [name for name in before if not name.startswith(f"{LAYERS[family]}.")]
    assert len(after) == len(made.order) * len(in_layers) + len(others)
    for name, tensor in after.items():
        assert (tensor == before[origin_of(made, name)]) is (name not in touched), name


@pytest.mark.parametrize("ranges", [((0, 2), (1, 3)), ((0, 1), (2, 3))], ids=["more", "fewer"])
def test_shards_of_a_base_with_repeated_layers_load_and_agree_with_their_index(ranges, pair, merged, stored):
    made = pair("llama", max_shard_size="60KB", ranges=ranges)
    wanted = compute(unmerged(made))
    out = merged(made.base, made.adapter, "--verify", "full")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(out.glob("*.safetensors"))) > 2
    assert sorted(index["weight_map"]) == sorted(stored(out))
    assert off_by(compute(load("llama", out)), wanted) <= FLOAT32_TOLERANCE


def test_repeated_layers_can_be_split_into_files_of_another_size(pair, merged, stored):
    made = pair("llama")
    one = merged(made.base, made.adapter)
    tensors = stored(one)
    two = merged(made.base, made.adapter, "--overwrite", "--max-shard-size", "100KB", "--verify", "full")
    assert len(list(two.glob("*.safetensors"))) > 2
    assert stored(two) == tensors


@pytest.mark.parametrize("family", PER_LAYER)
def test_a_list_with_an_entry_per_layer_is_repeated_with_the_layers(family, pair, merged):
    made = pair(family, ranges=((0, 2), (1, 3), (2, 3)))
    before = json.loads((made.base / "config.json").read_text())
    assert len(set(before["layer_types"])) == 2
    after = json.loads((merged(made.base, made.adapter) / "config.json").read_text())
    changes = {"num_hidden_layers": 5, "layer_types": per_layer(before["layer_types"], made.order)}
    assert after == before | changes
    assert list(after) == list(before)


def test_the_report_says_that_layers_were_repeated(pair, cli, tmp_path):
    made = pair()
    result = cli("--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out")
    assert (
        "layer_replication: the adapter repeats layers: the output has 4 layers, the base 3" in result.output
    )


def test_two_adapters_that_repeat_the_same_layers_are_merged_together(pair, cli, tmp_path):
    one, other = pair(), pair(target_modules=["q_proj", "o_proj"], use_rslora=True)
    adapters = ("--adapter", one.adapter, "--adapter", f"{other.adapter}:0.5")
    result = cli("--base", one.base, *adapters, "--out", tmp_path / "out", "--verify", "full")
    assert result.exit_code == 0, result.output
    model = unmerged(one)
    alone, wanted = compute(model), together(model, other, 0.5)
    assert off_by(alone, wanted) > LEAST_EFFECT
    assert off_by(compute(load("llama", tmp_path / "out")), wanted) <= FLOAT32_TOLERANCE


def together(model, other, weight):
    """Return the logits with another adapter's deltas added to the base's weights of PEFT's repeated layers."""
    deltas = {}
    second = unmerged(other)
    for name, module in second.named_modules():
        if hasattr(module, "get_delta_weight") and "default" in getattr(module, "lora_A", {}):
            deltas[name] = module.get_delta_weight("default").detach()
    for name, module in model.named_modules():
        plain = name.removesuffix(".base_layer")
        if plain in deltas and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(adding(deltas.pop(plain), weight))
    assert not deltas
    return compute(model)


def adding(delta, weight):
    """Return a hook that adds what a delta makes of a layer's input."""

    def hook(module, inputs, output):
        return output + weight * torch.nn.functional.linear(inputs[0], delta)

    return hook


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        pytest.param([[0, 2], [1, 4]], "the base has 3 layers", id="beyond_the_last"),
        pytest.param([[-1, 2], [1, 2]], "the base has 3 layers", id="before_the_first"),
        pytest.param([[2, 1]], "the base has 3 layers", id="nothing_left"),
        pytest.param([[0, 2], [1]], "expected a list of [start, end]", id="no_end"),
        pytest.param(7, "expected a list of [start, end]", id="no_list"),
        pytest.param([["0", "2"], ["1", "3"]], "expected a list of [start, end]", id="texts"),
        pytest.param([[0, 2.0], [1, 3]], "expected a list of [start, end]", id="a_fraction"),
    ],
)
def test_ranges_that_are_not_in_the_base_are_refused(value, sentence, pair, cli, tmp_path):
    made = pair()
    edit_json(made.adapter / "adapter_config.json", layer_replication=value)
    result = cli("--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "layer_replication" in result.output
    assert sentence in result.output
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_more_layers_than_its_ranges_is_refused(pair, cli, tmp_path):
    made = pair()
    edit_json(made.adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 2]])
    result = cli("--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "model.layers.3.self_attn.q_proj" in result.output


def test_adapters_that_repeat_different_layers_are_refused_together(pair, cli, tmp_path):
    one, other = pair(), pair(ranges=((0, 3), (2, 3)))
    result = cli(
        "--base", one.base, "--adapter", one.adapter, "--adapter", other.adapter, "--out", tmp_path / "out"
    )
    assert result.exit_code == 4, result.output
    assert "the adapters need different layers" in result.output


def test_an_adapter_that_decomposes_the_base_is_refused_with_repeated_layers(pair, cli, tmp_path):
    # PEFT decomposes the shared weight once for each copy, every time what the copy before has left
    made = pair(init_lora_weights="pissa")
    result = cli(
        "--base", made.base, "--adapter", made.adapter, "--out", tmp_path / "out", "--base-is", "original"
    )
    assert result.exit_code == 4, result.output
    assert "layer_replication" in result.output


def assert_right_or_refused(made, cli, out):
    """The command says no, or its output loads whole and computes what PEFT computes."""
    wanted = compute(unmerged(made))
    result = cli("--base", made.base, "--adapter", made.adapter, "--out", out)
    if result.exit_code == 4:
        assert not out.exists()
        return
    assert result.exit_code == 0, result.output
    architecture = getattr(transformers, FAMILIES[made.family][0])
    got, loading = architecture.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert off_by(compute(got), wanted) <= FLOAT32_TOLERANCE


def test_a_config_that_does_not_write_out_what_each_layer_is_does_not_change_what_the_layers_are(
    pair, cli, tampered, tmp_path
):
    # as Gemma 2 was published: the kind of attention follows from the place of a layer alone
    made = pair("gemma2")
    base = tampered(made.base)
    edit_json(base / "config.json", layer_types=...)
    assert_right_or_refused(Pair("gemma2", base, made.adapter, made.order), cli, tmp_path / "out")


def test_a_config_that_names_layers_by_their_number_does_not_change_what_the_layers_are(pair, cli, tmp_path):
    # mlp_only_layers: [1] has to become [1, 2] once layer 1 stands in the model twice
    made = pair("qwen3_moe", target_modules=["q_proj"])
    assert_right_or_refused(made, cli, tmp_path / "out")


def test_a_list_that_happens_to_be_as_long_as_the_model_is_deep_stays_as_it_is(pair, merged, tampered):
    made = pair("llama")
    base = tampered(made.base)
    edit_json(base / "config.json", eos_token_id=[2, 3, 4])
    config = json.loads((merged(base, made.adapter) / "config.json").read_text())
    assert config["eos_token_id"] == [2, 3, 4]
