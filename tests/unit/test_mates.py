"""Weights that engines load as one become dense together."""

from __future__ import annotations

import pytest

from lora_merge.planning.mates import fused_with, with_mates

LAYER = "model.layers.0."
NAMES = [
    *(f"{LAYER}self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"{LAYER}mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"{LAYER}mlp.experts.{n}.{name}.weight" for n in range(2) for name in ("gate_proj", "down_proj")),
    *(f"{LAYER}mlp.shared_experts.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
    *(f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")),
    *(f"{LAYER}indexer.{name}.weight" for name in ("wq", "wk", "wv", "weights_proj")),
    "model.layers.2.mlp.experts.gate_up_proj",
    "model.layers.2.mlp.experts.down_proj",
]


@pytest.mark.parametrize(
    ("touched", "wanted"),
    [
        ("self_attn.q_proj.weight", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("self_attn.o_proj.weight", ["self_attn.o_proj"]),
        ("mlp.up_proj.weight", ["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp.down_proj.weight", ["mlp.down_proj"]),
        (
            "mlp.experts.1.down_proj.weight",
            [f"mlp.experts.{n}.{name}" for n in range(2) for name in ("gate_proj", "down_proj")],
        ),
        (
            "mlp.shared_experts.gate_proj.weight",
            ["mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"],
        ),
        # Fused with wq and wv in one family, with weights_proj in another.
        ("indexer.weights_proj.weight", [f"indexer.{name}" for name in ("wq", "wk", "wv", "weights_proj")]),
    ],
)
def test_what_is_loaded_together_changes_together(touched, wanted):
    found = with_mates([LAYER + touched], NAMES)
    assert found == {f"{LAYER}{name}.weight" for name in wanted}


def test_both_stacks_of_a_layers_experts_are_one():
    names = {f"model.layers.2.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert with_mates(["model.layers.2.mlp.experts.down_proj"], NAMES) == names


def test_a_mate_that_is_not_quantised_is_left_alone():
    q, k = (f"{LAYER}self_attn.{name}_proj.weight" for name in "qk")
    assert with_mates([q], [q, k]) == {q, k}
    assert with_mates([], NAMES) == frozenset()


def test_what_is_one_matrix_shares_a_scale():
    found = fused_with(NAMES)
    assert found[f"{LAYER}self_attn.q_proj.weight"] == (
        f"{LAYER}self_attn.k_proj.weight",
        f"{LAYER}self_attn.v_proj.weight",
    )
    assert found[f"{LAYER}self_attn.o_proj.weight"] == ()
    assert found[f"{LAYER}mlp.experts.0.gate_proj.weight"] == ()  # its up is not there
    expert = "l.experts.1"
    pair = fused_with([f"{expert}.w1.weight", f"{expert}.w3.weight", "l.experts.0.w1.weight"])
    assert pair[f"{expert}.w1.weight"] == (f"{expert}.w3.weight",)
