"""Quantised bases whose weights lie otherwise than transformers has them are not decoded into something wrong."""

from __future__ import annotations

import pytest

from lora_merge.core.checkpoint import Checkpoint
from lora_merge.core.tensor import TensorRef
from lora_merge.core.weight import Storage, Weight
from lora_merge.planning.stored_otherwise import in_mlx_layout, turned_matrices

MLX = {"quantization": {"group_size": 64, "bits": 4}}
FP8 = {"quantization_config": {"quant_method": "fp8"}}


def base(config, names, settings, shape=(64, 64)):
    ref = TensorRef("codes", "U32", (64, 8), "file", 0, 64 * 32)
    coded = Weight(
        "model.layers.0.self_attn.q_proj.weight", (64, 64), Storage("mlx_affine", "U32"), {"weight": ref}
    )
    plain = [Weight.dense(TensorRef(name, "BF16", shape, "file", 0, 0)) for name in names]
    weights = {weight.name: weight for weight in (coded, *plain)}
    return Checkpoint("root", config | settings, (), False, {}, (), weights, quantisation=settings)


@pytest.mark.parametrize("family", ["gpt2", "imagegpt"])
def test_matrices_that_were_turned_round_are_refused(family):
    (issue,) = turned_matrices(base({"model_type": family}, [], FP8))
    assert issue.severity == "error"
    assert "quantising transposed them" in issue.sentence


def test_families_without_conv1d_are_not():
    assert turned_matrices(base({"model_type": "llama"}, [], FP8)) == []


@pytest.mark.parametrize(
    ("config", "names", "shape", "words"),
    [
        ({"model_type": "qwen3_next"}, [], (64, 64), "1 added"),
        ({"model_type": "baichuan_m1"}, [], (64, 64), "divides the rows"),
        (
            {"model_type": "qwen3_moe"},
            ["model.layers.0.mlp.switch_mlp.gate_proj.weight"],
            (4, 64, 64),
            "only mlx-lm",
        ),
        ({"model_type": "mamba"}, ["backbone.layers.0.mixer.conv1d.weight"], (128, 4, 1), "only mlx-lm"),
        (
            {"model_type": "qwen2_vl", "vision_config": {}},
            ["vision_tower.blocks.0.norm.weight"],
            (64,),
            "only mlx-lm",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_what_only_mlx_has_is_not_written_dense(config, names, shape, words):
    stored = base(config, names, MLX, shape)
    stored = Checkpoint(**{**{f: getattr(stored, f) for f in stored.__slots__}, "files": files_of(stored)})
    (issue,) = in_mlx_layout(stored)
    assert words in issue.sentence
    assert "mlx_lm.fuse" in issue.hint


def files_of(stored):
    from lora_merge.core.checkpoint import WeightFile

    refs = tuple(ref for weight in stored.weights.values() for ref in weight.parts.values())
    return (WeightFile("model.safetensors", {}, refs),)


def test_a_plain_family_of_mlx_and_other_methods_are_written_dense():
    assert in_mlx_layout(base({"model_type": "llama"}, ["model.norm.weight"], MLX, (64,))) == []
    assert in_mlx_layout(base({"model_type": "qwen3_next"}, [], FP8)) == []
