"""The gate's rule for quantised weights, and its search for settings that were left: tiny directories of every storage."""

from __future__ import annotations

import json
import struct

import pytest

from lora_merge.checks.gate import RULES
from lora_merge.core.tensor import nbytes_of
from lora_merge.formats.written_checkpoint import read_output

HIGH, WIDE = 256, 384
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD = {"lm_head.weight": ("BF16", (64, WIDE))}


def dense(name):
    return {f"{name}.weight": ("BF16", (HIGH, WIDE))}


def fp8_blocks(name):
    return {f"{name}.weight": ("F8_E4M3", (HIGH, WIDE)), f"{name}.weight_scale_inv": ("F32", (2, 3))}


def modelopt_blocks(name):
    return {
        f"{name}.weight": ("F8_E4M3", (HIGH, WIDE)),
        f"{name}.weight_scale": ("F32", (-(-HIGH // 128), 1, -(-WIDE // 128), 1)),
    }


def fp8_rows(name):
    return {f"{name}.weight": ("F8_E4M3", (HIGH, WIDE)), f"{name}.weight_scale": ("BF16", (HIGH, 1))}


def fp8_tensor(name):
    scales = {f"{name}.{part}": ("F32", ()) for part in ("weight_scale", "input_scale")}
    return {f"{name}.weight": ("F8_E4M3", (HIGH, WIDE)), **scales}


def mxfp8(name):
    return {f"{name}.weight": ("F8_E4M3", (HIGH, WIDE)), f"{name}.weight_scale": ("U8", (HIGH, WIDE // 32))}


def mxfp4(name):
    return {
        f"{name}.weight_packed": ("U8", (HIGH, WIDE // 2)),
        f"{name}.weight_scale": ("U8", (HIGH, WIDE // 32)),
    }


def nvfp4(name):
    return {
        f"{name}.weight_packed": ("U8", (HIGH, WIDE // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (HIGH, WIDE // 16)),
        f"{name}.weight_global_scale": ("F32", (1,)),
    }


def packed(name):
    return {
        f"{name}.weight_packed": ("I32", (HIGH, WIDE // 8)),
        f"{name}.weight_scale": ("BF16", (HIGH, WIDE // 128)),
        f"{name}.weight_zero_point": ("I32", (HIGH // 8, WIDE // 128)),
        f"{name}.weight_shape": ("I64", (2,)),
    }


def int8(name):
    return {f"{name}.weight": ("I8", (HIGH, WIDE)), f"{name}.weight_scale": ("BF16", (HIGH, 1))}


def gptq(name):
    return {
        f"{name}.qweight": ("I32", (WIDE // 8, HIGH)),
        f"{name}.qzeros": ("I32", (3, HIGH // 8)),
        f"{name}.scales": ("F16", (3, HIGH)),
        f"{name}.g_idx": ("I32", (WIDE,)),
    }


def awq(name):
    return {
        f"{name}.qweight": ("I32", (WIDE, HIGH // 8)),
        f"{name}.qzeros": ("I32", (3, HIGH // 8)),
        f"{name}.scales": ("F16", (3, HIGH)),
    }


def bnb(name):
    return {
        f"{name}.weight": ("U8", (HIGH * WIDE // 2, 1)),
        f"{name}.weight.absmax": ("F32", (HIGH * WIDE // 64,)),
        f"{name}.weight.quant_map": ("F32", (16,)),
        f"{name}.weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    }


def bnb_as_floats(name):
    return {**bnb(name), f"{name}.weight": ("BF16", (HIGH * WIDE // 4, 1))}


def llm_int8(name):
    return {
        f"{name}.weight": ("I8", (HIGH, WIDE)),
        f"{name}.SCB": ("F32", (HIGH,)),
        f"{name}.weight_format": ("U8", ()),
    }


def mlx(name):
    small = ("BF16", (HIGH, WIDE // 64))
    return {f"{name}.weight": ("U32", (HIGH, WIDE // 8)), f"{name}.scales": small, f"{name}.biases": small}


def torchao(name):
    return {f"{name}._weight_qdata": ("I8", (HIGH, WIDE)), f"{name}._weight_scale": ("F32", (HIGH, 1))}


def modelopt_awq(name):
    return {
        f"{name}.weight": ("U8", (HIGH // 2, WIDE)),
        f"{name}.weight_scale": ("F32", (HIGH, WIDE // 128)),
        f"{name}.pre_quant_scale": ("BF16", (WIDE,)),
    }


def modelopt_nvfp4(name):
    return {
        f"{name}.weight": ("U8", (HIGH, WIDE // 2)),
        f"{name}.weight_scale": ("F8_E4M3", (HIGH, WIDE // 16)),
        f"{name}.weight_scale_2": ("F32", ()),
    }


def gpt_oss(name):
    return {f"{name}_blocks": ("U8", (2, HIGH, 3, 16)), f"{name}_scales": ("U8", (2, HIGH, 3))}


def group(**weights):
    return {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "quant_method": "compressed-tensors",
    }


STORAGES = {
    "fp8_blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "modelopt_blocks": (modelopt_blocks, {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}),
    "fp8_rows": (fp8_rows, group(num_bits=8, group_size=None)),
    "fp8_tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "mxfp8": (mxfp8, group(num_bits=8, group_size=32)),
    "mxfp4": (mxfp4, group(num_bits=4, group_size=32)),
    "nvfp4": (nvfp4, group(num_bits=4, group_size=16)),
    "packed": (packed, group(num_bits=4, group_size=128)),
    "int8": (int8, group(num_bits=8, group_size=None)),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 128}),
    "bnb": (bnb, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bnb_as_floats": (bnb_as_floats, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "llm_int8": (llm_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "mlx": (mlx, {"bits": 4, "group_size": 64}),
    "torchao": (torchao, {"quant_method": "torchao"}),
    "modelopt_awq": (modelopt_awq, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}),
    "modelopt_nvfp4": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "gpt_oss": (gpt_oss, {"quant_method": "mxfp4"}),
}
each = pytest.mark.parametrize("storage", STORAGES)


def name_of(layer, projection):
    return f"model.layers.{layer}.self_attn.{projection}"


def tensors_of(storage):
    """Return the tensors of two layers, quantised, with a dense head."""
    make, _ = STORAGES[storage]
    names = [name_of(layer, projection) for layer in range(2) for projection in PROJECTIONS]
    return {**HEAD, **{part: row for name in names for part, row in make(name).items()}}


def config_of(storage):
    _, settings = STORAGES[storage]
    return {"quantization" if storage == "mlx" else "quantization_config": {**settings}}


@pytest.fixture
def found(tmp_path):
    """Return a function (tensors, configuration, contents, rule) → ``(code, subject)`` of what a rule finds."""

    def look(tensors, config, contents=None, rule="quantised", files=None):
        header, data = {}, b""
        for name, (dtype, shape) in tensors.items():
            content = (contents or {}).get(name) or bytes(nbytes_of(dtype, shape))
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
        text = json.dumps(header).encode()
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
        whole = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        for name, table in (files or {}).items():
            (tmp_path / name).write_text(json.dumps(table))
        issues = list(RULES[rule](read_output(tmp_path)))
        assert {issue.severity for issue in issues} <= {"error"}
        return [(issue.code, issue.subject) for issue in issues]

    return look


FIRST = name_of(0, "q_proj")


def without(tensors, *names):
    return {name: row for name, row in tensors.items() if name not in names}


def parts_of(tensors, module):
    return [name for name in tensors if name.startswith(module)]


@each
def test_a_sound_directory_passes(storage, found):
    tensors = tensors_of(storage)
    assert found(tensors, config_of(storage)) == []
    assert found(tensors, config_of(storage), rule="config") == []
    assert found(tensors, config_of(storage), rule="embeddings") == []


@each
def test_settings_that_were_left_are_found_and_settings_that_are_missing(storage, found):
    tensors = tensors_of(storage)
    codes = [code for code, _ in found({**HEAD, **dense(FIRST)}, config_of(storage), rule="config")]
    assert codes == ["leftover-quantisation"]
    assert found(tensors, {}) == [("missing-quantisation", "config.json")]


def test_settings_in_a_side_file_are_settings(found):
    files = {"quantize_config.json": STORAGES["gptq"][1]}
    assert found(tensors_of("gptq"), {}, files=files) == []


@each
def test_a_dense_weight_beside_parts_is_found(storage, found):
    tensors = tensors_of(storage)
    plain = f"{FIRST}.weight" if storage != "gpt_oss" else FIRST
    tensors[plain] = ("BF16", (HIGH, WIDE) if storage != "gpt_oss" else (2, WIDE // 4, HIGH))
    assert ("dense-and-quantised", plain) in found(tensors, config_of(storage))
    # Even where only one of them was left.
    left = [part for part in parts_of(tensors, FIRST) if part != plain][:1]
    clean = without(tensors, *(set(parts_of(tensors, FIRST)) - {plain, *left}))
    assert ("dense-and-quantised", plain) in found(clean, config_of(storage))


@pytest.mark.parametrize(
    "part", ["qzeros", "g_idx", "weight_shape", "SCB", "weight.quant_map", "scales", "input_scale"]
)
def test_a_part_that_was_left_in_a_dense_model_is_found(part, found):
    tensors = {**HEAD, **dense(FIRST), f"{FIRST}.{part}": ("F32", (4,))}
    assert found(tensors, {}) == [("dense-and-quantised", f"{FIRST}.weight")]


def scales_of(storage):
    return next(
        name
        for name in STORAGES[storage][0](FIRST)
        if name.endswith(("scale", "scale_inv", "scales", "SCB", "absmax")) and "input" not in name
    )


@each
def test_codes_without_scales_are_found(storage, found):
    tensors = without(tensors_of(storage), scales_of(storage))
    codes, subjects = zip(*found(tensors, config_of(storage)), strict=True)
    # Nothing says that a column of floats holds codes but its scales; what else there is stands beside a weight then.
    assert codes[0] == ("dense-and-quantised" if storage == "bnb_as_floats" else "codes-without-scales")
    assert subjects[0].startswith(FIRST)


@each
def test_scales_without_codes_are_found(storage, found):
    codes = next(iter(STORAGES[storage][0](FIRST)))
    issues = found(without(tensors_of(storage), codes), config_of(storage))
    assert issues[0] == ("scales-without-codes", scales_of(storage))


@each
def test_scales_of_another_number_are_found(storage, found):
    tensors = tensors_of(storage)
    name = scales_of(storage)
    dtype, shape = tensors[name]
    tensors[name] = (dtype, (*shape[:-1], shape[-1] + 3) if shape else (5,))
    assert ("wrong-scales", name) in found(tensors, config_of(storage))


def test_scales_of_a_method_that_is_not_known_are_not_counted(found):
    tensors = {**HEAD, "a.weight": ("U8", (64, 100)), "a.weight_scale": ("F32", (1,))}
    assert found(tensors, {"quantization_config": {"quant_method": "bitnet"}}) == []


def test_a_last_block_may_be_cut_off(found):
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors = {**HEAD, "a.weight": ("F8_E4M3", (130, 100)), "a.weight_scale_inv": ("F32", (2, 1))}
    assert found(tensors, config) == []
    tensors["a.weight_scale_inv"] = ("F32", (1, 1))
    assert found(tensors, config) == [("wrong-scales", "a.weight_scale_inv")]


# dense modules among quantised ones


def mixed(storage, *modules):
    """Return tensors and settings of which some modules are dense."""
    tensors = tensors_of(storage)
    for module in modules:
        tensors = without(tensors, *parts_of(tensors, module))
        tensors |= dense(module) if storage != "gpt_oss" else {module: ("BF16", (2, WIDE // 4, HIGH))}
    return tensors


WHOLE = [name_of(0, projection) for projection in ("q_proj", "k_proj", "v_proj")]


@each
def test_a_dense_module_that_no_setting_excepts_is_found(storage, found):
    issues = found(mixed(storage, name_of(0, "o_proj")), config_of(storage))
    assert issues == [("not-excepted", name_of(0, "o_proj"))]


EXCEPTIONS = {
    "a name": {"ignore": ["model.layers.0.self_attn.o_proj"]},
    "a part of a name": {"modules_to_not_convert": ["layers.0"]},
    "the last part": {"llm_int8_skip_modules": ["o_proj"]},
    "a wildcard": {"exclude_modules": ["model.layers.0*"]},
    "a wildcard inside": {"modules_to_not_convert": ["model.layers.*.self_attn"]},
    "an expression": {"ignore": [r"re:.*layers\.0\..*"]},
    "an expression of gptq": {"dynamic": {r"-:model\.layers\.0\..*": {}}},
    "another root": {"ignore": ["language_model.model.layers.0.self_attn.o_proj"]},
    "false": {"model.layers.0.self_attn.o_proj": False},
    "sixteen bits": {"extra_config": {"model.layers.0.self_attn.o_proj": {"bits": 16}}},
    "other targets": {"config_groups": {"a": {"targets": [r"re:.*layers\.1\..*"], "weights": {"group_size": 128, "num_bits": 4}}}},
    "other layers": {"quantized_layers": {"model.layers.1.self_attn.o_proj": {}}},
}  # fmt: skip


@pytest.mark.parametrize("way", EXCEPTIONS)
def test_a_setting_may_except_a_module_in_any_way(way, found):
    settings = {"quant_method": "compressed-tensors", "bits": 4, "group_size": 128, **EXCEPTIONS[way]}
    tensors = mixed("packed", name_of(0, "o_proj"))
    assert found(tensors, {"quantization_config": settings}) == []


@pytest.mark.parametrize(
    "setting",
    [{"ignore": ["lm_head", "k_proj", "re:.*layers.1.*", "re:("]}, {"dynamic": {"+:.*": {"bits": 8}}}, {}],
)
def test_a_setting_that_means_others_excepts_nothing(setting, found):
    settings = {"quant_method": "compressed-tensors", "bits": 4, "group_size": 128, **setting}
    tensors = mixed("packed", name_of(0, "o_proj"))
    assert found(tensors, {"quantization_config": settings}) == [("not-excepted", name_of(0, "o_proj"))]


def test_a_name_that_engines_give_to_fused_modules_excepts_them_all(found):
    config = {
        "quantization_config": {**STORAGES["packed"][1], "ignore": ["model.layers.0.self_attn.qkv_proj"]}
    }
    assert found(mixed("packed", *WHOLE), config) == []


def test_a_quantised_module_that_is_listed_as_dense_is_found(found):
    config = {"quantization_config": {**STORAGES["packed"][1], "ignore": [FIRST]}}
    assert found(tensors_of("packed"), config) == [("wrong-exception", FIRST)]


# modules that engines load as one


@each
def test_fused_modules_of_which_one_is_dense_are_found(storage, found):
    key, settings = next(iter(config_of(storage).items()))
    config = {key: {**settings, "ignore": [FIRST]}}
    # Engines of MLX and bitsandbytes load each module alone.
    is_alone = storage in {"mlx", "bnb", "bnb_as_floats", "llm_int8"}
    assert found(mixed(storage, FIRST), config) == (
        [] if is_alone else [("mates-differ", name_of(0, "k_proj"))]
    )
    config = {key: {**settings, "ignore": WHOLE}}
    assert found(mixed(storage, *WHOLE), config) == []


def test_fused_modules_of_other_groups_are_found(found):
    tensors = tensors_of("packed")
    tensors[f"{FIRST}.weight_scale"] = ("BF16", (HIGH, WIDE // 64))
    settings = group(num_bits=4, group_size=128)
    settings["config_groups"]["group_1"] = {"targets": [FIRST], "weights": {"num_bits": 4, "group_size": 64}}
    assert found(tensors, {"quantization_config": settings}) == [("mates-differ", name_of(0, "k_proj"))]


@pytest.mark.parametrize("storage", ["nvfp4", "modelopt_nvfp4"])
def test_fused_modules_share_the_scale_of_the_whole_weight(storage, found):
    end = "weight_global_scale" if storage == "nvfp4" else "weight_scale_2"
    tensors, one = tensors_of(storage), struct.pack("<f", 3.0)
    same = {f"{name_of(0, projection)}.{end}": one for projection in PROJECTIONS}
    assert found(tensors, config_of(storage), same) == []
    other = {**same, f"{name_of(0, 'v_proj')}.{end}": struct.pack("<f", 3.5)}
    assert found(tensors, config_of(storage), other) == [("shared-scale", f"{name_of(0, 'v_proj')}.{end}")]
    # o_proj is loaded alone.
    alone = {**same, f"{name_of(0, 'o_proj')}.{end}": struct.pack("<f", 3.5)}
    assert found(tensors, config_of(storage), alone) == []


def test_all_experts_of_a_layer_are_stored_alike(found):
    names = [f"model.layers.{layer}.mlp.experts.{n}.down_proj" for layer in range(2) for n in range(3)]
    tensors = {**HEAD, **{part: row for name in names for part, row in fp8_blocks(name).items()}}
    assert found(tensors, config_of("fp8_blocks")) == []
    odd = without(tensors, *parts_of(tensors, names[1])) | dense(names[1])
    config = {"quantization_config": {**STORAGES["fp8_blocks"][1], "modules_to_not_convert": [names[1]]}}
    assert found(odd, config) == [("mates-differ", names[1])]


# names that ordinary models have too


def test_parameters_with_common_names_are_no_parts(found):
    tensors = {
        **HEAD,
        **dense(FIRST),
        "model.norm.scale": ("BF16", (WIDE,)),
        "model.layers.0.attn.k_scale": ("F32", (1,)),
        "model.layers.0.biases": ("BF16", (4, 4)),
        "model.layers.0.input_scale": ("F32", ()),
        "model.table.weight": ("I64", (4, 4)),
        "logit_scale": ("F32", ()),
    }
    assert found(tensors, {}) == []
    assert found(tensors, {}, rule="config") == []
    assert found(tensors, {"quantization": "none"}, rule="config") == []


def test_a_linear_layer_that_no_setting_excepts_is_found(found):
    tensors = {
        **HEAD,
        **{part: row for one in PROJECTIONS[:3] for part, row in int8(name_of(0, one)).items()},
    }
    tensors |= dense(name_of(0, "o_proj"))
    settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = {**config_of("int8"), **settings, "num_attention_heads": 4}
    left = name_of(0, "o_proj")
    assert found(tensors, config) == []  # no other layer has one like it
    assert found(tensors, config, rule="linear") == [("not-excepted", left)]
    config["quantization_config"]["ignore"] = ["lm_head", left]
    assert found(tensors, config, rule="linear") == []
    config["quantization_config"]["ignore"] = ["lm_head", FIRST]
    assert found(tensors, config, rule="linear") == [("not-excepted", left)]


NAN, MINUS, ONE = struct.pack("<f", float("nan")), struct.pack("<f", -1.0), struct.pack("<f", 1.0)


@pytest.mark.parametrize(
    ("storage", "part", "content", "is_wrong"),
    [
        ("fp8_blocks", "weight_scale_inv", ONE * 6, False),
        ("fp8_blocks", "weight_scale_inv", ONE * 5 + NAN, True),
        ("fp8_blocks", "weight_scale_inv", MINUS + ONE * 5, True),
        ("fp8_tensor", "weight_scale", struct.pack("<f", float("inf")), True),
        ("nvfp4", "weight_global_scale", ONE, False),
        ("nvfp4", "weight_global_scale", bytes(4), True),
        ("nvfp4", "weight_global_scale", MINUS, True),
        ("modelopt_nvfp4", "weight_scale_2", NAN, True),
        ("mxfp4", "weight_scale", b"\x7f" * (HIGH * WIDE // 32), False),
        ("mxfp4", "weight_scale", b"\xff" * (HIGH * WIDE // 32), True),
        ("gptq", "scales", struct.pack("<e", -1.0) * (3 * HIGH), False),
        ("gptq", "scales", struct.pack("<e", float("inf")) * (3 * HIGH), True),
    ],
)
def test_a_scale_that_is_no_scale_is_found(storage, part, content, is_wrong, found):
    tensors = tensors_of(storage)
    # Sound ones everywhere else.
    contents = {name: ONE for name in tensors if name.endswith(("global_scale", "weight_scale_2"))}
    assert found(tensors, config_of(storage), contents, rule="scales") == []
    name = f"{FIRST}.{part}"
    wrong = [("bad-scale", name)] if is_wrong else []
    assert found(tensors, config_of(storage), {**contents, name: content}, rule="scales") == wrong
