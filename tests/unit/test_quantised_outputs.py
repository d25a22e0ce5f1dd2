"""What the configuration of an output says: all dense, or some modules dense among quantised ones."""

from __future__ import annotations

import copy
import re

import pytest

from lora_merge.core.checkpoint import ConfigPatch, patched_config
from lora_merge.quantised import (
    SIDE_FILES,
    excepting,
    folds_norms,
    leftover,
    plain_config,
    plain_metadata,
    refusals,
)
from tests.quantised_headers import AWQ_PARTS, EVERY, FP8, GPTQ, GPTQ_PARTS, MODULES, compressed, modelopt, of

LAYER = "model.layers.0.self_attn"
QKV = tuple(f"{LAYER}.{name}_proj" for name in "qkv")
CODES = {".weight": ("F8_E4M3", (256, 384)), ".weight_scale_inv": ("F32", (2, 3))}


def edited(method, parts, modules, all_modules=QKV, **more):
    headers = of(method, parts, "", {}, modules=all_modules, **more)
    found = headers.found()
    assert found.issues == ()
    before = copy.deepcopy(dict(found.settings))
    edits = excepting(found.settings, modules, found.weights)
    assert dict(found.settings) == before  # nothing is changed in place
    return edits


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_a_dense_output_says_nothing_of_quantisation(headers):
    config = {"model_type": "x", **headers.config, "text_config": {"hidden_size": 8, **headers.config}}
    plain = patched_config(config, ConfigPatch(delete=plain_config(config)))
    assert plain == {"model_type": "x", "text_config": {"hidden_size": 8}}
    assert set(headers.side) <= SIDE_FILES
    assert refusals(plain, {}) == []


def test_a_plain_base_keeps_its_configuration():
    assert plain_config({"text_config": {"model_type": "x"}, "quantization_level": 3}) == ()


def test_scales_that_belong_to_no_weight_are_told_from_weights():
    left = ["k_scale", "v_scale", "q_scale", "kv_scale", "input_scale", "k_proj.output_scale", "prob_scale"]
    kept = [
        "layernorm.weight",
        "scale",
        "logit_scale",
        "layer_scale",
        "weight_scale",
        "k_proj.bias",
        "ls1.gamma",
        "q_scales",
    ]
    assert [name for name in left if not leftover(f"model.layers.0.attn.{name}")] == []
    assert [name for name in kept if leftover(f"model.layers.0.attn.{name}")] == []


@pytest.mark.parametrize("listed", ["null", "missing", "empty"])
def test_a_list_that_becomes_explicit_names_the_head(listed):
    """Null means transformers' own defaults, which leave the head dense."""
    method = {**FP8, "modules_to_not_convert": None if listed == "null" else []}
    if listed == "missing":
        del method["modules_to_not_convert"]
    edits = edited(method, CODES, [QKV[0]])
    assert edits["quantization_config"]["modules_to_not_convert"] == ["lm_head", QKV[0]]


def test_a_list_that_is_explicit_is_kept():
    edits = edited({**FP8, "modules_to_not_convert": ["visual"]}, CODES, [QKV[0]])
    assert edits["quantization_config"]["modules_to_not_convert"] == ["visual", QKV[0]]
    edits = edited(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": ["visual"]},
        CODES,
        [QKV[0]],
    )
    assert edits["quantization_config"]["ignored_layers"] == ["visual", QKV[0]]
    assert "modules_to_not_convert" not in edits["quantization_config"]


def test_a_head_of_another_name_is_named_too():
    headers = of({**FP8, "modules_to_not_convert": None}, CODES, "", {})
    headers.tensors |= {"score.weight": ("BF16", (2, 256)), "model.embed_tokens.weight": ("BF16", (512, 256))}
    found = headers.found()
    edits = excepting(found.settings, [MODULES[0]], found.weights)
    assert edits["quantization_config"]["modules_to_not_convert"] == ["lm_head", "score", MODULES[0]]


def test_nothing_changes_where_no_module_becomes_dense():
    assert edited(FP8, CODES, []) == {}


def test_rules_of_gptq_are_anchored_escaped_and_first():
    method = {**GPTQ, "dynamic": {"+:.*": {"bits": 4}}}
    edits = edited(method, GPTQ_PARTS, QKV)
    rules = edits["quantization_config"]["dynamic"]
    assert list(rules)[-1] == "+:.*"
    assert rules[f"-:^{re.escape(QKV[0])}$"] == {}
    negative = [re.compile(rule.removeprefix("-:")) for rule in rules if rule.startswith("-:")]
    named = {*QKV, f"{LAYER}.qkv_proj"}  # vLLM asks about the name of the fused layer
    others = {
        "model.layers.0.self_attn.q_proj2",
        "model.layers.10.self_attn.q_proj",
        "xmodel.layers.0.self_attn.q_proj",
        f"{LAYER}.o_proj",
    }
    asked = named | others
    assert {name for name in asked if any(rule.match(name) for rule in negative)} == named


def test_half_of_a_fused_layer_has_no_name_of_its_own():
    rules = edited(GPTQ, GPTQ_PARTS, QKV[:2])["quantization_config"]["dynamic"]
    assert len(rules) == 2


def test_awq_in_a_file_of_gptqmodel_has_rules_too():
    method = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}
    edits = edited(method, AWQ_PARTS, [QKV[0]], side={"quantize_config.json": dict(method)})
    assert edits["quantization_config"]["modules_to_not_convert"] == ["lm_head", QKV[0]]
    assert edits["quantize_config.json"]["dynamic"] == {f"-:^{re.escape(QKV[0])}$": {}}


def test_modelopt_says_it_in_both_files():
    layers = {module: {"quant_algo": "FP8"} for module in QKV}
    side = {
        "hf_quant_config.json": {
            "producer": {"name": "modelopt"},
            "quantization": {
                "quant_algo": "MIXED_PRECISION",
                "exclude_modules": ["lm_head"],
                "quantized_layers": layers,
            },
        }
    }
    parts = {".weight": ("F8_E4M3", (256, 384)), ".weight_scale": ("F32", ())}
    edits = edited(modelopt("MIXED_PRECISION", quantized_layers=layers), parts, [QKV[0]], side=side)
    assert edits["quantization_config"]["ignore"] == ["lm_head", QKV[0]]
    inner = edits["hf_quant_config.json"]["quantization"]
    assert inner["exclude_modules"] == ["lm_head", QKV[0]]
    assert (
        set(inner["quantized_layers"])
        == set(edits["quantization_config"]["quantized_layers"])
        == set(QKV[1:])
    )
    assert edits["hf_quant_config.json"]["producer"] == {"name": "modelopt"}


def test_a_whole_stack_of_experts_is_named_by_its_path():
    experts = tuple(f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(3))
    whole = edited(FP8, CODES, experts, experts)["quantization_config"]["modules_to_not_convert"]
    assert whole == ["lm_head", *experts, "model.layers.0.mlp.experts"]
    part = edited(FP8, CODES, experts[:2], experts)["quantization_config"]["modules_to_not_convert"]
    assert part == ["lm_head", *experts[:2]]


def test_parameters_of_a_stack_are_named_by_their_module():
    headers = EVERY["mxfp4"]
    found = headers.found()
    edits = excepting(found.settings, [headers.names[0]], found.weights)
    assert edits["quantization_config"]["modules_to_not_convert"][-1] == "model.layers.0.mlp.experts"


def test_old_settings_are_changed_where_they_are():
    inner = compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})
    parts = {".weight": ("F8_E4M3", (256, 384)), ".weight_scale": ("BF16", (256, 1))}
    edits = edited(
        {"quantization_config": inner, "sparsity_config": {}}, parts, [QKV[0]], key="compression_config"
    )
    assert edits["compression_config"]["quantization_config"]["ignore"] == ["lm_head", QKV[0]]
    assert edits["compression_config"]["sparsity_config"] == {}


def test_mlx_has_false_for_a_dense_module():
    found = EVERY["mlx, 4 bits"].found()
    edits = excepting(found.settings, [MODULES[0]], found.weights)
    assert edits["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine", MODULES[0]: False}


@pytest.mark.parametrize(
    ("key", "folds"),
    [
        ("awq", True),
        ("modelopt AWQ, in its file alone", True),
        ("modelopt NVFP4", False),
        ("gptq", False),
        ("modelopt, mixed", False),
    ],
)
def test_methods_that_fold_scales_into_norms_are_told(key, folds):
    assert folds_norms(EVERY[key].found().settings) is folds


def test_the_header_of_torchao_follows():
    metadata = EVERY["torchao INT8"].metadata
    changed = plain_metadata({"format": "pt", **metadata}, [f"{MODULES[0]}.weight", "other.weight"])
    assert changed == {"format": "pt", **metadata, f"{MODULES[0]}.weight": '{"_type": "Tensor"}'}
