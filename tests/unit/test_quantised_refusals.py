"""Ways to quantise that are not read are refused by small files alone, each with its own sentence."""

from __future__ import annotations

import pytest

from lora_merge.errors import UnsupportedError
from lora_merge.planning.locate import find
from lora_merge.quantised import METHODS, refusals
from lora_merge.quantised.refused import KNOWN
from tests.quantised_headers import EVERY, GPTQ, INT4, compressed

CT = compressed("pack-quantized", INT4)

REFUSED = {
    **{
        name: ({"quant_method": name}, word)
        for name, word in [
            ("hqq", "HQQ"), ("aqlm", "AQLM"), ("vptq", "VPTQ"), ("spqr", "SpQR"), ("higgs", "HIGGS"), ("eetq", "EETQ"),
            ("bitnet", "BitNet"), ("fp_quant", "FP-Quant"), ("sinq", "SINQ"), ("quark", "Quark"), ("quanto", "quanto"),
            ("gguf", "GGUF"), ("auto-round", "AutoRound"), ("intel/auto-round", "AutoRound"),
        ]
    },
    "unknown": ({"quant_method": "made_up"}, "(made_up), an unknown method"),
    "unnamed": ({"load": True}, "this table does not name a method (quant_method)"),
    "no text": ({"quant_method": 7}, "this table does not name a method (quant_method)"),
    "gptq marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin': only gptq and gptq_v2"),
    "gptq marlin of AutoGPTQ": ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "checkpoint_format is 'marlin'"),
    "gptq in other words": ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype is 'int16', expected int32"),
    "gptq, 5 bits": ({**GPTQ, "bits": 5}, "bits is 5, expected 2, 3, 4 or 8"),
    "awq gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version is 'gemv': the only supported layout of AWQ is gemm"),
    "awq gemv_fast": ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "version is 'gemv_fast'"),
    "awq marlin": ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "version is 'marlin'"),
    "awq, 8 bits": ({"quant_method": "awq", "bits": 8, "version": "gemm"}, "bits is 8, expected 4"),
    "ct, rotated": ({**CT, "transform_config": {"config_groups": {"u": {}}}}, "the weights are rotated"),
    "ct, sparse": ({**CT, "format": "sparse-24-bitmask"}, "format is 'sparse-24-bitmask': sparse and marlin layouts"),
    "ct marlin-24": ({**CT, "format": "marlin-24"}, "format is 'marlin-24'"),
    "ct, sparse beside": ({**CT, "sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config has the format 'sparse-bitmask'"),
    "ct, frozen": ({**CT, "quantization_status": "frozen"}, "quantization_status is 'frozen', expected 'compressed'"),
}  # fmt: skip


@pytest.mark.parametrize(("table", "sentence"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("level", ["", "text_config"])
def test_a_method_is_refused_by_its_configuration(table, sentence, level):
    config = {"quantization_config": table}
    config = {"_name_or_path": "org/parent", **({level: config} if level else config)}
    (issue,) = refusals(config, {})
    assert issue.code == "unsupported"
    assert issue.subject == f"{level}.quantization_config".lstrip(".")
    assert sentence in issue.sentence
    assert issue.hint == "merge into its full-precision parent: --base PARENT (perhaps org/parent)"


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_what_is_read_is_not_refused(headers):
    assert refusals(headers.config, headers.side) == []


def test_every_method_that_is_known_is_in_the_table():
    assert set(KNOWN) - {"mxfp8"} == set(METHODS)


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"quantization_config": "fp8"}]
)
def test_empty_settings_say_nothing(config):
    assert refusals(config, {}) == []


def test_two_tables_that_say_the_same_are_one_reason():
    table = {"quant_method": "hqq"}
    assert (
        len(refusals({"quantization_config": table, "text_config": {"quantization_config": table}}, {})) == 1
    )


def test_a_file_beside_is_read_too():
    (issue,) = refusals({}, {"quantize_config.json": {"bits": 4, "checkpoint_format": "marlin"}})
    assert issue.subject == "quantize_config.json"


@pytest.mark.parametrize(
    ("name", "kind", "parent"),
    [
        ("Qwen/Qwen3-8B-GGUF", "GGUF", "Qwen/Qwen3-8B"),
        ("ggml-org/Qwen3-8B-Q4_K_M-GGUF", "GGUF", "ggml-org/Qwen3-8B"),
        ("org/Llama-3-8B-HQQ-4bit", "HQQ", "org/Llama-3-8B"),
        ("org/Llama-3-8B-AQLM-2Bit-1x16-hf", "AQLM", "org/Llama-3-8B"),
        ("org/Qwen3-8B-exl2", "exl2", "org/Qwen3-8B"),
        ("org/Qwen3-8B-EXL3", "EXL3", "org/Qwen3-8B"),
        ("org/Qwen3-8B-exl2-4.0bpw", "exl2", "org/Qwen3-8B"),
    ],
)
def test_a_name_of_a_format_that_is_not_read_is_refused(name, kind, parent):
    with pytest.raises(UnsupportedError) as refused:
        find(name, "base")
    (issue,) = refused.value.issues
    assert issue.sentence == f"the base is stored as {kind} (according to its name), which is not supported"
    assert issue.hint == f"merge into its full-precision original, probably --base {parent}"


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/Qwen3-8B-bnb-4bit", "mlx-community/Qwen3-8B-4bit", "Qwen/Qwen3-8B-AWQ", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4",
        "Qwen/Qwen3-8B-FP8", "nvidia/Llama-3.1-8B-Instruct-NVFP4", "Qwen/Qwen3-8B",
    ],
)  # fmt: skip
def test_other_names_say_nothing(name):
    assert find(name, "base").repo == name
