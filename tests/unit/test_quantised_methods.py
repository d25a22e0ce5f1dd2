"""Each storage is found: names, shapes and settings of its weights, whose parts are all theirs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest

from lora_merge.core.weight import Storage
from lora_merge.quantised import METHODS, describe, excepting, identify
from tests.quantised_headers import EVERY, FP8, GPTQ, GPTQ_PARTS, MODULES, compressed, of

LEFT = {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_a_storage_is_found(headers):
    found = headers.found()

    assert found.issues == ()
    quantised = {name: weight for name, weight in found.weights.items() if not weight.storage.is_dense}
    assert set(quantised) == set(headers.names)
    for weight in quantised.values():
        assert weight.shape == headers.shape
        assert weight.storage == Storage(
            headers.codec, weight.parts["weight"].dtype, tuple(sorted(headers.settings.items()))
        )
    dense = {name for name, weight in found.weights.items() if weight.storage.is_dense}
    assert {name for name in dense if not name.endswith("_bias")} == LEFT
    parts = [ref.name for weight in found.weights.values() for ref in weight.parts.values()]
    assert sorted(parts) == sorted(headers.tensors)  # each is part of one weight
    assert found.others == ()


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_a_storage_has_words(headers):
    words = {describe(weight.storage) for weight in headers.found().weights.values()}
    assert len(words) == 2
    assert "BF16" in words
    assert all("_" not in word for word in words)


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_with_one_module_dense_it_is_found_again(headers):
    """What `excepting` writes, `identify` reads."""
    before = headers.found()
    name = headers.names[0]
    module = name.removesuffix(".weight")
    edits = excepting(before.settings, [module], before.weights)

    after = copy.deepcopy(headers)
    after.config = {key: edits.get(key, value) for key, value in headers.config.items()}
    after.side = {key: edits.get(key, value) for key, value in headers.side.items()}
    for ref in before.weights[name].parts.values():
        del after.tensors[ref.name]
    after.tensors[name] = ("BF16", headers.shape)
    # A stack of another layer is not named: its module is excepted as a whole.
    found = after.found()

    assert found.issues == ()
    assert found.weights[name].storage == Storage("dense", "BF16")
    assert {n for n, weight in found.weights.items() if not weight.storage.is_dense} == set(headers.names[1:])
    assert edits


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_only_the_method_that_is_named_finds_anything(headers):
    around = headers.found()
    assert around.weights
    found = [
        key
        for key, method in METHODS.items()
        if method.identify({ref.name: ref for ref in headers.refs()}, _around(headers)).weights
    ]
    assert len(found) == 1


def _around(headers):
    from lora_merge.quantised import Surroundings

    return Surroundings(headers.config, headers.read, headers.side, headers.metadata)


def test_a_checkpoint_without_settings_is_dense():
    headers = of({}, {".weight": ("BF16", (8, 8)), ".bias": ("F32", (8,))}, "dense", {})
    found = headers.found()
    assert found.issues == ()
    assert found.settings == {}
    assert set(found.weights) == set(headers.tensors)


def test_groups_are_chosen_by_name_then_by_regex_then_by_class():
    config = compressed("mixed-precision", {})
    eight = {"num_bits": 8, "type": "float", "strategy": "channel"}
    config["config_groups"] = {
        "class": {"format": "int-quantized", "targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}},
        "regex": {"format": "float-quantized", "targets": [r"re:.*layers\.[01]\..*"], "weights": {**eight, "strategy": "tensor"}},
        "name": {"format": "float-quantized", "targets": [MODULES[0]], "weights": eight},
    }  # fmt: skip
    headers = of(config, {".weight": ("F8_E4M3", (256, 384)), ".weight_scale": ("F32", (1,))}, "scaled", {})
    headers.tensors[f"{MODULES[0]}.weight_scale"] = ("F32", (256, 1))
    headers.tensors["other.weight"] = ("I8", (8, 8))
    headers.tensors["other.weight_scale"] = ("BF16", (8, 1))

    found = headers.found()

    assert found.issues == ()
    rows = {name: dict(weight.storage.settings).get("block_rows") for name, weight in found.weights.items()}
    assert (rows[f"{MODULES[0]}.weight"], rows[f"{MODULES[1]}.weight"]) == (1, 0)
    assert dict(found.weights["other.weight"].storage.settings)["codes"] == "I8"


def test_the_first_rule_of_gptq_that_matches_counts():
    rules = {r"-:.*layers\.1\..*": {}, r"+:.*down_proj": {"bits": 4, "group_size": 64}, r"-:.*": {}}
    headers = of({**GPTQ, "bits": 2, "dynamic": rules}, GPTQ_PARTS, "gptq", {})
    for suffix in GPTQ_PARTS:
        del headers.tensors[f"{MODULES[1]}{suffix}"]
    headers.tensors[f"{MODULES[1]}.weight"] = ("F16", (256, 384))

    found = headers.found()

    assert found.issues == ()
    assert dict(found.weights[f"{MODULES[0]}.weight"].storage.settings)["bits"] == 4
    assert found.weights[f"{MODULES[1]}.weight"].plain is not None


def test_tables_of_mlx_for_single_modules_count():
    config = {"group_size": 64, "bits": 4, MODULES[0]: {"group_size": 32, "bits": 8}, "lm_head": False}
    parts = {".weight": ("U32", (256, 48)), ".scales": ("BF16", (256, 6)), ".biases": ("BF16", (256, 6))}
    headers = of(config, parts, "mlx_affine", {}, key="quantization")
    headers.tensors |= {
        f"{MODULES[0]}.weight": ("U32", (256, 96)),
        f"{MODULES[0]}.scales": ("BF16", (256, 12)),
        f"{MODULES[0]}.biases": ("BF16", (256, 12)),
    }
    found = headers.found()
    assert found.issues == ()
    assert {weight.shape for name, weight in found.weights.items() if "down_proj" in name} == {(256, 384)}


def test_scales_of_the_cache_belong_to_no_weight():
    headers = of(
        FP8, {".weight": ("F8_E4M3", (256, 384)), ".weight_scale_inv": ("F32", (2, 3))}, "scaled", {}
    )
    headers.tensors["model.layers.0.self_attn.k_proj.k_scale"] = ("F32", ())
    found = headers.found()
    assert found.issues == ()
    assert [ref.name for ref in found.others] == ["model.layers.0.self_attn.k_proj.k_scale"]


def test_settings_of_a_part_of_the_model_are_found():
    headers = copy.deepcopy(EVERY["fp8 blocks"])
    headers.config = {"text_config": headers.config}
    found = headers.found()
    assert found.issues == ()
    assert list(found.settings) == ["text_config.quantization_config"]


def test_the_json_of_bitsandbytes_says_the_dtype():
    from lora_merge.quantised import stored_dtype

    found = EVERY["bnb NF4"].found()
    assert stored_dtype(found.settings, {}) == "F16"
    assert stored_dtype(found.settings, {"torch_dtype": "bfloat16"}) == "BF16"
    assert stored_dtype({}, {"text_config": {"dtype": "float32"}}) == "F32"
    assert stored_dtype({}, {"dtype": "auto"}) == "BF16"


def test_a_zero_of_ones_is_noted():
    headers = copy.deepcopy(EVERY["gptq"])
    assert headers.found().issues == ()
    headers.contents = {".qzeros": bytes(100) + b"\xf0" + bytes(667)}
    (issue,) = headers.found().issues
    assert (issue.severity, issue.code, issue.subject) == ("note", "ambiguous-zeros", f"{MODULES[0]}.qzeros")
    headers.config["quantization_config"] = {**GPTQ, "checkpoint_format": "gptq_v2"}
    assert headers.found().issues == ()


def test_a_stack_of_several_files_is_one_weight():
    headers = EVERY["gptq"]
    refs = [replace(ref, file=f"{n % 3}.safetensors") for n, ref in enumerate(headers.refs())]
    found = identify(refs, _around(headers))
    assert found.issues == ()
    assert found.weights[f"{MODULES[0]}.weight"].files == {"0.safetensors", "1.safetensors", "2.safetensors"}


def test_json_of_torchao_that_is_none_is_refused():
    headers = copy.deepcopy(EVERY["torchao FP8"])
    headers.metadata = {name: text[:-1] for name, text in headers.metadata.items()}
    assert "does not name its class" in headers.found().issues[0].sentence
    headers.metadata = {name: json.dumps({"_type": "AffineQuantizedTensor"}) for name in headers.metadata}
    assert "calls it 'AffineQuantizedTensor'" in headers.found().issues[0].sentence


@pytest.mark.parametrize("algorithm", [{"quant_algo": None}, {}])
def test_a_quantised_cache_alone_leaves_weights_dense(algorithm):
    table = {"quant_method": "modelopt", "kv_cache_quant_algo": "FP8", **algorithm}
    headers = of(table, {".weight": ("BF16", (8, 8)), ".k_scale": ("F32", ())}, "dense", {})
    found = headers.found()
    assert found.issues == ()
    assert all(weight.storage.is_dense for weight in found.weights.values())
    assert {ref.name for ref in found.others} == {f"{module}.k_scale" for module in MODULES}
    headers.tensors[f"{MODULES[0]}.weight"] = ("F8_E4M3", (8, 8))
    assert "quant_algo is None, expected one of" in headers.found().issues[0].sentence
