"""The schemes of ``--quantize``: configurations as llm-compressor writes them, and tensors that are identified again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_merge.core.tensor import TensorRef, nbytes_of
from lora_merge.planning.quantising import parts_of
from lora_merge.quantised import Surroundings, identify
from lora_merge.quantised.schemes import OF_GPT_OSS, SCHEMES

RECORDED = Path(__file__).parents[1] / "fixtures" / "quantising.json"
FP8 = Path(__file__).parents[1] / "fixtures" / "quantised" / "fp8-block" / "config.json"
BESIDE = {
    "version",
    "sparsity_config",
    "transform_config",
    "moe_sparsity_config",
    "global_compression_ratio",
}
"""What llm-compressor writes as well, all of it empty but for its version."""

each = pytest.mark.parametrize("name", SCHEMES)
MODULE = "model.layers.0.mlp.up_proj"
SHAPES = [(384, 256), (12, 384)]


def by_llm_compressor(name):
    """Return the configuration that it wrote."""
    return json.loads(RECORDED.read_text())["outputs"][f"{name} even"]["config"]


@pytest.mark.parametrize("name", [name for name in SCHEMES if name != "fp8"])
def test_the_configuration_is_llm_compressors(name):
    ours, theirs = SCHEMES[name].config(["lm_head"]), by_llm_compressor(name)
    assert theirs.keys() - ours.keys() == BESIDE
    assert not any(theirs[key] for key in BESIDE - {"version"})
    group = theirs["config_groups"]["group_0"]
    assert group["weights"].pop("observer") == "memoryless_minmax"
    assert ours == {key: value for key, value in theirs.items() if key not in BESIDE}


def test_the_configuration_of_fp8_is_transformers():
    theirs = json.loads(FP8.read_text())["quantization_config"]
    assert SCHEMES["fp8"].config(["lm_head"]) == theirs


def test_a_configuration_is_new_at_each_call():
    one = SCHEMES["int4"].config(["a"])
    one["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    assert SCHEMES["int4"].config(["a"])["config_groups"]["group_0"]["weights"]["num_bits"] == 4


def refs(parts):
    """Return tensors as a header has them."""
    return [
        TensorRef(name, dtype, shape, "model.safetensors", 0, nbytes_of(dtype, shape))
        for name, dtype, shape in parts.values()
    ]


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_written_is_identified_again(name, shape):
    scheme = SCHEMES[name]
    numbers = b"".join(size.to_bytes(8, "little") for size in shape)
    around = Surroundings({"quantization_config": scheme.config(["lm_head"])}, lambda _: numbers)
    found = identify(refs(parts_of(scheme, MODULE, shape)), around)
    assert not found.issues
    assert not found.others
    (weight,) = found.weights.values()
    assert (weight.name, weight.shape) == (f"{MODULE}.weight", shape)
    assert weight.storage == scheme.storage
    assert weight.parts.keys() == scheme.suffixes.keys()


def test_experts_of_gpt_oss_are_identified_again():
    scheme, name = OF_GPT_OSS["mxfp4"], "model.layers.0.mlp.experts.down_proj"
    parts = parts_of(scheme, name, (4, 64, 96))
    assert parts == {
        "weight": (f"{name}_blocks", "U8", (4, 96, 2, 16)),
        "scale": (f"{name}_scales", "U8", (4, 96, 2)),
    }
    around = Surroundings({"quantization_config": scheme.config(["lm_head"])}, lambda _: b"")
    found = identify(refs(parts), around)
    assert not found.issues
    (weight,) = found.weights.values()
    assert (weight.name, weight.shape, weight.storage) == (name, (4, 64, 96), scheme.storage)


@each
def test_tensors_are_called_as_the_libraries_call_them(name):
    scheme = SCHEMES[name]
    outputs = json.loads(RECORDED.read_text())["outputs"][f"{name} even"]["tensors"]
    expected = {key for key in outputs if key.startswith(MODULE)}
    assert {key for key, _, _ in parts_of(scheme, MODULE, (384, 256)).values()} == expected


@pytest.mark.parametrize(
    ("name", "shape", "fused", "words"),
    [
        ("int4", (64, 192), False, "192 input features, which is not a multiple of 128"),
        ("int4-g32", (64, 192), False, ""),
        ("mxfp4", (64, 48), False, "48 input features, which is not a multiple of 32"),
        ("nvfp4", (64, 48), False, ""),
        ("nvfp4", (64, 24), False, "not a multiple of 16"),
        ("int8", (7, 13), True, ""),
        ("fp8-channel", (7, 13), True, ""),
        # transformers leaves alone what its blocks do not fit, and would read it wrongly.
        ("fp8", (192, 256), False, "192 output features, which is not a multiple of 128"),
        ("fp8", (256, 192), False, "192 input features"),
        # compressed-tensors has blocks that are cut off, but not between two weights.
        ("fp8-block", (192, 320), False, ""),
        ("fp8-block", (192, 320), True, "192 output features, which is not a multiple of 128"),
    ],
)
def test_a_weight_that_does_not_fit_is_told(name, shape, fused, words):
    found = SCHEMES[name].misfit(shape, is_fused=fused)
    assert (words in found) if words else found == ""


def test_only_a_global_scale_is_surveyed():
    assert [name for name, scheme in SCHEMES.items() if scheme.is_surveyed] == ["nvfp4"]


@each
def test_people_are_told_what_it_is(name):
    scheme = SCHEMES[name]
    assert scheme.name == name
    assert scheme.words
    assert "\n" not in scheme.words
    assert "vLLM" in scheme.engines
