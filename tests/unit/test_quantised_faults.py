"""Tensors and configuration that disagree: each is an error that names the tensor, what was found and what was expected."""

from __future__ import annotations

import copy
import json
import struct
from dataclasses import replace

import pytest

from lora_merge.quantised import identify
from lora_merge.quantised.method import PatternError, Surroundings
from lora_merge.words import alike
from tests.quantised_headers import (
    EVERY,
    FP8,
    GPTQ,
    GPTQ_PARTS,
    INT4,
    MODULES,
    NESTED,
    PACKED,
    STATE,
    compressed,
    of,
)

FREE = {
    "input_scale",
    "input_scale_ub",
    "input_global_scale",
    "qscale_act",
    "weight_format",
    "pre_quant_scale",
}
"""Parts that may be missing."""


def parts_of(headers):
    module = headers.names[0].removesuffix(".weight")
    return [name for name in headers.tensors if name.startswith(module) and not name.endswith("_bias")]


CASES = [
    (key, name)
    for key, headers in EVERY.items()
    for name in parts_of(headers)
    if name.rpartition(".")[2] not in FREE
]


def errors(headers):
    return [issue for issue in headers.found().issues if issue.severity == "error"]


def broken(key, name, entry):
    headers = copy.deepcopy(EVERY[key])
    del headers.tensors[name]
    if entry is not None:
        headers.tensors[name] = entry
    return headers


@pytest.mark.parametrize(("key", "name"), CASES)
def test_a_part_that_is_missing_is_named(key, name):
    issues = errors(broken(key, name, None))
    assert len(issues) == 1  # one fault, said once
    assert MODULES[0].rpartition(".")[0] in issues[0].subject
    assert issues[0].code == "quantised"
    assert "--base PARENT" in issues[0].hint
    last = name.rpartition(".")[2].rpartition("_proj")[2] or name
    sentence = issues[0].sentence
    assert (
        last in sentence
        or "missing" in sentence
        or (last, "weight_scale_inv" in sentence) == ("qscale_weight", True)
    )


@pytest.mark.parametrize(("key", "name"), CASES)
def test_a_part_of_another_dtype_is_refused(key, name):
    shape = EVERY[key].tensors[name][1]
    issues = errors(broken(key, name, ("F64", shape)))
    assert len(issues) == 1
    assert any(word in issues[0].sentence for word in ("F64", "codes are missing", "gives", "bytes"))


@pytest.mark.parametrize(
    ("key", "name"),
    [case for case in CASES if EVERY[case[0]].tensors[case[1]][1] and "quant_state" not in case[1]],
)
def test_a_part_of_another_shape_is_refused(key, name):
    dtype, shape = EVERY[key].tensors[name]
    issues = errors(broken(key, name, (dtype, (*shape[:-1], shape[-1] + 33))))
    is_alone = (
        EVERY[key].codec in {"scaled", "llm_int8"}
        and EVERY[key].settings.get("block_columns", 0) == 0
        and name.endswith(".weight")
    )
    # Where one scale is for a row or the tensor, no other part tells how long a row is.
    assert len(issues) == (0 if is_alone else 1)


@pytest.mark.parametrize("key", EVERY)
def test_a_module_that_is_dense_without_an_exception_is_refused(key):
    headers = copy.deepcopy(EVERY[key])
    name = headers.names[0]
    for part in parts_of(headers):
        del headers.tensors[part]
    headers.tensors[name] = ("BF16", headers.shape)
    (issue,) = errors(headers)
    assert issue.subject == name.removesuffix(".weight")
    assert "is stored dense, but the same module of other layers is quantised" in issue.sentence


@pytest.mark.parametrize("key", EVERY)
def test_settings_without_quantised_tensors_are_refused(key):
    headers = copy.deepcopy(EVERY[key])
    for part in [name for name in headers.tensors if ".layers." in name]:
        del headers.tensors[part]
    headers.tensors |= dict.fromkeys(headers.names, ("BF16", headers.shape))
    (issue,) = errors(headers)
    assert "says that weights are quantised" in issue.sentence
    assert "remove" in issue.hint


@pytest.mark.parametrize("key", EVERY)
def test_quantised_tensors_without_settings_are_refused(key):
    headers = copy.deepcopy(EVERY[key])
    headers.config, headers.side = {"_name_or_path": "org/parent"}, {}
    if key == "bnb INT8":
        headers.tensors.pop("x", None)
    (issue,) = errors(headers)
    assert issue.code == "unsupported"
    assert "its configuration does not say how" in issue.sentence
    assert issue.hint.endswith("--base PARENT (perhaps org/parent)")


def test_blocks_are_taken_from_the_configuration():
    """192 x 256 in blocks of 128 has as many scales as in blocks of 96: a quotient of shapes would decode it wrongly."""
    parts = {".weight": ("F8_E4M3", (192, 256)), ".weight_scale_inv": ("F32", (2, 2))}
    found = of(FP8, parts, "scaled", {}).found()
    assert dict(found.weights[f"{MODULES[0]}.weight"].storage.settings)["block_rows"] == 128
    (issue, _) = errors(of({**FP8, "weight_block_size": [64, 128]}, parts, "scaled", {}))
    assert (
        "has shape (2, 2), expected (3, 2), as quantization_config says (FP8, blocks of 64 x 128)"
        in issue.sentence
    )


@pytest.mark.parametrize(
    ("entry", "is_refused"),
    [
        (MODULES[0], True),
        ("model.layers.0", True),
        (r"re:.*layers\.0.*", False),
        ("model.layers.0.mlp.down", False),
    ],
)
def test_codes_of_an_excepted_module_are_refused(entry, is_refused):
    parts = {".weight": ("F8_E4M3", (256, 384)), ".weight_scale_inv": ("F32", (2, 3))}
    issues = errors(of({**FP8, "modules_to_not_convert": [entry]}, parts, "scaled", {}))
    assert [issue.subject for issue in issues] == ([MODULES[0]] if is_refused else [])


def test_names_that_begin_alike_are_other_names():
    """``layers.1`` is not ``layers.11``, and ``gate`` is not ``gate_proj``."""
    modules = ("model.layers.11.mlp.gate_proj", "model.layers.1.mlp.gate_proj")
    parts = {".weight": ("F8_E4M3", (256, 384)), ".weight_scale_inv": ("F32", (2, 3))}
    config = {**FP8, "modules_to_not_convert": ["model.layers.1.mlp.gate", "model.layers.1.mlp.gate_proj"]}
    issues = errors(of(config, parts, "scaled", {}, modules=modules))
    assert [issue.subject for issue in issues] == ["model.layers.1.mlp.gate_proj"]


def test_a_weight_that_is_there_twice_is_refused():
    headers = copy.deepcopy(EVERY["gptq"])
    headers.tensors[f"{MODULES[0]}.weight"] = ("F16", (256, 384))
    (issue,) = errors(headers)
    assert issue.sentence == f"is stored twice: in full precision, and quantised ({MODULES[0]}.qweight)"


def test_tables_of_two_methods_are_refused():
    headers = copy.deepcopy(EVERY["gptq"])
    headers.side = {"hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}}}
    (issue,) = errors(headers)
    assert issue.subject == "hf_quant_config.json"
    assert issue.sentence == "names the method modelopt, but quantization_config names gptq"


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {**GPTQ, "dynamic": {"-:(": {}}},
            "dynamic has '-:(', which is not a regular expression: missing ), unterminated subpattern at position 0",
        ),
        (
            {**GPTQ, "dynamic": {"-:.*": {}}},
            "is stored quantised, but quantization_config says that it is not (dynamic)",
        ),
    ],
)
def test_rules_of_gptq_that_cannot_be_are_refused(config, sentence):
    assert errors(of(config, GPTQ_PARTS, "gptq", {}))[0].sentence == sentence


def test_a_pattern_that_takes_too_long_is_refused():
    def slow(expressions, names):
        raise PatternError(0, "takes more than 3 s to match")

    headers = of(
        compressed("pack-quantized", INT4, ignore=["lm_head", "re:(a+)+$"]), PACKED, "packed_int", {}
    )
    headers.contents = EVERY["ct INT4"].contents
    around = Surroundings(headers.config, headers.read, match=slow)
    (issue,) = identify(headers.refs(), around).issues
    assert issue.sentence == "ignore has 're:(a+)+$', which takes more than 3 s to match"


def test_a_module_without_a_group_is_refused():
    config = compressed("pack-quantized", INT4)
    config["config_groups"]["group_0"]["targets"] = [MODULES[0]]
    headers = of(config, PACKED, "packed_int", {}, contents=EVERY["ct INT4"].contents)
    (issue,) = errors(headers)
    assert (issue.subject, issue.sentence) == (
        f"{MODULES[1]}.weight_packed",
        "is stored as I32, but no group of config_groups targets it",
    )


def test_codes_for_one_kernel_are_refused():
    headers = copy.deepcopy(EVERY["bnb INT8"])
    headers.contents = {"weight_format": b"\x02"}
    assert "layout of the codes for a special kernel" in errors(headers)[0].sentence
    headers = copy.deepcopy(EVERY["torchao INT8"])
    headers.contents = {"zero_point": bytes(255) + b"\x01"}
    assert "is not zero everywhere" in errors(headers)[0].sentence


@pytest.mark.parametrize(
    "state", [b"", b"{", b"[]", b'{"shape": [0, 4]}', b'{"shape": [256, 384]}', b'{"shape": [true]}']
)
def test_json_of_bitsandbytes_that_cannot_be_used_is_refused(state):
    headers = copy.deepcopy(EVERY["bnb NF4"])
    headers.contents = dict.fromkeys(headers.contents, state)
    assert [issue.subject for issue in errors(headers)] == [
        f"{module}.weight.quant_state.bitsandbytes__nf4" for module in MODULES
    ]


def test_the_same_fault_of_many_modules_is_one_line():
    modules = tuple(f"model.layers.{n}.mlp.experts.{e}.up_proj" for n in range(4) for e in range(50))
    headers = of(FP8, {".weight": ("F8_E4M3", (256, 384))}, "scaled", {}, modules=modules)
    (group,) = alike(errors(headers))
    assert str(group).startswith(
        "model.layers.{0-3}.mlp.experts.{0-49}.up_proj.weight: holds F8_E4M3 codes, but has no weight_scale_inv, "
    )
    assert "; 200 times" in str(group)


@pytest.mark.parametrize(
    ("key", "part", "values", "found"),
    [
        ("gptq", "g_idx", [99, *[0] * 383], 99),
        ("gptq", "g_idx", [6, *[5] * 383], 6),
        ("gptq", "g_idx", [0, -1, *[5] * 382], -1),
        ("gptq", "g_idx", [-1] * 384, -1),
        ("gptq", "g_idx", [5] * 384, None),
        ("ct INT4, ordered", "weight_g_idx", [0] * 383 + [3], 3),
        ("ct INT4, ordered", "weight_g_idx", [0] * 383 + [-1], -1),
        ("ct INT4, ordered", "weight_g_idx", [-2] * 384, -2),
        ("ct INT4, ordered", "weight_g_idx", [-1] * 384, None),
        ("ct INT4, ordered", "weight_g_idx", [2, 1, 0] * 128, None),
    ],
)
def test_an_index_of_a_group_that_is_not_there_is_refused(key, part, values, found):
    headers = copy.deepcopy(EVERY[key])
    groups, also = (6, "") if key == "gptq" else (3, ", or -1 everywhere")
    headers.contents[f"{MODULES[0]}.{part}"] = struct.pack("<384i", *values)
    sentence = f"has the index {found}, expected 0 to {groups - 1}{also}"
    wanted = [] if found is None else [(f"{MODULES[0]}.{part}", sentence)]
    assert [(issue.subject, issue.sentence) for issue in errors(headers)] == wanted


def test_modules_of_one_name_may_differ_within_the_last_word_of_a_row():
    headers = copy.deepcopy(EVERY["ct INT4"])
    widths = dict(zip(MODULES, (381, 384), strict=True))
    headers.contents = {
        f"{module}.weight_shape": struct.pack("<2q", 256, width) for module, width in widths.items()
    }
    found = headers.found().weights
    assert {name: found[f"{name}.weight"].shape for name in MODULES} == {
        name: (256, width) for name, width in widths.items()
    }


def test_a_block_of_bitsandbytes_that_ends_inside_a_byte_is_refused():
    headers = copy.deepcopy(EVERY["bnb NF4"])
    headers.contents = dict.fromkeys(headers.contents, json.dumps({**STATE, "blocksize": 63}).encode())
    assert errors(headers)[0].sentence == "gives the blocksize 63, expected an even number"


def test_double_quantisation_without_its_offset_is_refused():
    headers = copy.deepcopy(EVERY["bnb NF4, nested"])
    state = {key: value for key, value in NESTED.items() if key != "nested_offset"}
    headers.contents = dict.fromkeys(headers.contents, json.dumps(state).encode())
    first = errors(headers)[0]
    assert first.subject == f"{MODULES[0]}.weight.quant_state.bitsandbytes__nf4"
    assert first.sentence == "gives no nested_offset, but the weight is double-quantised"


@pytest.mark.parametrize(
    ("key", "field"),
    [
        ("fp8 blocks", "modules_to_not_convert"),
        ("awq", "modules_to_not_convert"),
        ("bnb NF4", "llm_int8_skip_modules"),
        ("bnb INT8", "llm_int8_skip_modules"),
    ],
)
@pytest.mark.parametrize(
    ("entry", "modules"),
    [
        ("down_proj", MODULES),
        ("0.mlp.down_proj", MODULES[:1]),
        (MODULES[1], MODULES[1:]),
        ("proj", ()),
        ("mlp", ()),
    ],
)
def test_codes_of_a_module_that_is_excepted_by_its_end_are_refused(key, field, entry, modules):
    headers = copy.deepcopy(EVERY[key])
    table = headers.config["quantization_config"]
    headers.config["quantization_config"] = {**table, field: ["lm_head", entry]}
    issues = errors(headers)
    assert [issue.subject for issue in issues] == list(modules)
    assert {issue.sentence for issue in issues} <= {
        f"is stored quantised, but quantization_config says that it is not ({field})"
    }


def test_torchao_beside_safetensors_is_refused_for_its_file():
    headers = copy.deepcopy(EVERY["torchao INT8"])
    refs = [replace(ref, file="pytorch_model.bin") for ref in headers.refs()]
    issues = identify(refs, Surroundings(headers.config, headers.read)).issues
    assert issues[0].sentence == (
        "is stored by torchao, but its file has no header that names its class: "
        "torchao is read from safetensors only"
    )


@pytest.mark.parametrize(
    ("key", "table", "name", "side", "sentence"),
    [
        ("gptq", {}, "quantize_config.json", {"bits": 8}, "bits is 8, but bits in quantization_config is 4"),
        ("gptq", {}, "quantize_config.json", {"group_size": 128}, "group_size is 128, but group_size in quantization_config is 64"),
        (
            "gptq", {}, "quantize_config.json", {"checkpoint_format": "gptq_v2", "format": "gptq_v2"},
            "checkpoint_format is 'gptq_v2', but checkpoint_format in quantization_config is 'gptq'",
        ),
        ("awq", {}, "quant_config.json", {"w_bit": 4, "q_group_size": 32}, "q_group_size is 32, but group_size in quantization_config is 64"),
        (
            "awq", {"zero_point": True}, "quant_config.json", {"w_bit": 4, "zero_point": False},
            "zero_point is False, but zero_point in quantization_config is True",
        ),
        (
            "modelopt NVFP4", {}, "hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}},
            "quant_algo is 'FP8', but quant_algo in quantization_config is 'NVFP4'",
        ),
        ("gptq", {"format": "gptq_v2"}, "quantization_config", None, "checkpoint_format is 'gptq', but format is 'gptq_v2'"),
        ("gptq", {"format": "gptq", "desc_act": False}, "quantize_config.json", {"bits": 4, "desc_act": True, "group_size": None}, ""),
        ("gptq, one group", {"group_size": -1}, "quantize_config.json", {"bits": 4, "group_size": 0, "format": "GPTQ"}, ""),
        ("awq", {}, "quant_config.json", {"w_bit": 4, "q_group_size": 64, "version": "GEMM"}, ""),
        ("modelopt FP8 blocks", {}, "hf_quant_config.json", {"quantization": {"quant_algo": "FP8_PB_WO", "group_size": 128}}, ""),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(key, table, name, side, sentence):
    headers = copy.deepcopy(EVERY[key])
    headers.config["quantization_config"] = {**headers.config["quantization_config"], **table}
    headers.side = {name: side} if side else {}
    wanted = [(name, sentence)] if sentence else []
    assert [(issue.subject, issue.sentence) for issue in errors(headers)] == wanted
    assert set(headers.names) <= headers.found().weights.keys()  # so that nothing more is said of them


def test_a_layout_that_contradicts_itself_is_one_fault():
    headers = copy.deepcopy(EVERY["gptq"])
    headers.config["quantization_config"] = {**GPTQ, "checkpoint_format": "gptq_v2", "format": "gptq"}
    headers.side = {"quantize_config.json": {"bits": 4, "format": "gptq"}}
    (issue,) = errors(headers)
    assert issue.sentence == "checkpoint_format is 'gptq_v2', but format is 'gptq'"
