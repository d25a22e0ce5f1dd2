"""The table of common decoders says what transformers says of them, and nothing where it is not sure."""

from __future__ import annotations

import pytest

from lora_merge.modeling import skeleton as skeletons
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.dense_families import is_whole, linear_layers, parameters_of
from lora_merge.modeling.skeleton import build_skeleton, meta_model

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_hidden_layers": 2,
    "num_key_value_heads": 3, "vocab_size": 96,
}  # fmt: skip
FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
VARIANTS = {
    "plain": {},
    "head_dim": {"head_dim": 16},
    "head_dim is null": {"head_dim": None},
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False, "head_dim": 4},
    "biases of attention": {"attention_bias": True, "head_dim": 8},
    "biases of the MLP": {"mlp_bias": True, "head_dim": 8},
    "all biases": {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1, "head_dim": 8},
    "one head of keys": {"num_key_value_heads": 1, "head_dim": 8},
    "sliding window": {
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "head_dim": 8,
    },
    "quantised": {"quantization_config": {"quant_method": "fp8"}, "head_dim": 8},
}


def config_of(architecture, variant):
    return {"architectures": [architecture], "model_type": FAMILIES[architecture], **SIZES, **variant}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_parameters_and_linear_layers_are_those_of_transformers(architecture, variant):
    config = config_of(architecture, variant)
    found = parameters_of(config)
    if found is None:
        # Only what these families do with a head_dim that is no number is left to transformers.
        assert architecture in {"Qwen2ForCausalLM", "Qwen3ForCausalLM"}
        assert config.get("head_dim") is None
        assert linear_layers(config) is None
        return
    model = meta_model(config)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == wanted
    skeleton = build_skeleton(config)
    linear = {name for name, kind in skeleton.classes.items() if kind == "Linear"}
    assert linear_layers(config) == linear - {skeleton.output_embedding}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_skeleton_is_that_of_transformers(architecture, variant, tied, monkeypatch):
    config = config_of(architecture, {**variant, "tie_word_embeddings": tied, "hidden_act": "silu"})
    with monkeypatch.context() as patch:
        patch.setattr(skeletons, "meta_model", lambda config: pytest.fail("transformers was asked"))
        found = None if parameters_of(config) is None else build_skeleton(config)
    with monkeypatch.context() as patch:
        patch.setattr(skeletons, "modules_of", lambda config: None)
        wanted = build_skeleton(config)
    if found is None:
        assert config.get("head_dim") is None
        return
    assert found == wanted
    # In the same order, too, since messages name the first of several.
    assert list(found.classes) == list(wanted.classes)


@pytest.mark.parametrize(
    "variant",
    [
        {"hidden_act": "silu"},
        {"hidden_act": "silu", "tie_word_embeddings": None},
        {"hidden_act": "gelu", "tie_word_embeddings": False},
        {"hidden_act": ["silu"], "tie_word_embeddings": False},
        {"hidden_act": "silu", "tie_word_embeddings": 1},
    ],
    ids=repr,
)
def test_a_skeleton_that_is_not_sure_is_left_to_transformers(variant, monkeypatch):
    asked = []
    monkeypatch.setattr(skeletons, "meta_model", asked.append)
    assert build_skeleton(config_of("LlamaForCausalLM", {"head_dim": 8, **variant})) is None
    assert len(asked) == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_whole_misses_nothing_in_transformers(architecture, tied):
    config = config_of(architecture, {"tie_word_embeddings": tied, "head_dim": 8})
    whole, conversion = parameters_of(config), Conversion.of(config)
    assert is_whole(config, whole)
    assert not conversion.missing(whole)
    for name in whole:
        rest = {other: shape for other, shape in whole.items() if other != name}
        assert is_whole(config, rest) == (tied and name == "lm_head.weight"), name
        assert not is_whole(config, rest) or not conversion.missing(rest), name
    for name, shape in whole.items():
        odd = {**whole, name: (*shape[:-1], shape[-1] + 1)}
        assert not is_whole(config, odd), name


@pytest.mark.parametrize(
    "variant",
    [
        {"model_type": "gemma"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": None},
        {"num_key_value_heads": None},
        {"hidden_size": 0},
        {"hidden_size": 50},
        {"vocab_size": "96"},
        {"num_hidden_layers": True},
        {"attention_bias": 1},
        {"head_dim": -8},
    ],
    ids=str,
)
def test_what_the_table_is_not_sure_of_it_leaves_to_transformers(variant):
    config = config_of("LlamaForCausalLM", variant)
    assert parameters_of(config) is None
    assert not is_whole(config, {})


def test_a_tensor_too_many_is_left_to_transformers():
    config = config_of("LlamaForCausalLM", {})
    whole = parameters_of(config)
    # Both would be stored for one parameter.
    assert not is_whole(config, {**whole, "layers.0.mlp.up_proj.weight": (80, 48)})
