"""What every layout keeps, for each member of `LAYOUTS`: it names stored tensors, or says that it cannot."""

from __future__ import annotations

from functools import cache

import pytest

from lora_merge.core.tensor import TensorRef
from lora_merge.layouts import LAYOUTS, LayoutError, Place, Stored, locate
from lora_merge.modeling.conversion import Conversion

HIDDEN, INNER, EXPERTS, VOCAB = 16, 6, 3, 32


@cache
def config(kind):
    """Return the ``config.json`` of a tiny model."""
    import transformers

    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": VOCAB}
    if kind == "gpt_neox":
        made = transformers.GPTNeoXConfig(**sizes, intermediate_size=INNER)
        return {**made.to_dict(), "architectures": ["GPTNeoXForCausalLM"]}
    if kind == "gpt_oss":
        made = transformers.GptOssConfig(
            **sizes, num_key_value_heads=2, head_dim=8, intermediate_size=INNER, num_local_experts=EXPERTS
        )
        return {**made.to_dict(), "architectures": ["GptOssForCausalLM"]}
    made = transformers.Qwen3MoeConfig(
        **sizes, num_key_value_heads=2, head_dim=8, moe_intermediate_size=INNER, num_experts=EXPERTS
    )
    return {**made.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]}


def stored(kind, shapes):
    """Return a checkpoint of a family ("" for one that transformers has no class for), by names and shapes."""
    refs = {name: TensorRef(name, "BF16", shape, "file", 0, 0) for name, shape in shapes.items()}
    return Stored(refs, lambda: Conversion.of(config(kind)) if kind else None)


LAYER = "model.layers.0.mlp.experts"
ONE_BY_ONE = {
    f"{LAYER}.{expert}.{name}.weight": (HIDDEN, INNER) if name == "down_proj" else (INNER, HIDDEN)
    for expert in range(EXPERTS)
    for name in ("gate_proj", "up_proj", "down_proj")
}
FUSED = {
    f"{LAYER}.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
    f"{LAYER}.down_proj": (EXPERTS, HIDDEN, INNER),
}
ACROSS = {
    f"{LAYER}.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
    f"{LAYER}.gate_up_proj_bias": (EXPERTS, 2 * INNER),
    f"{LAYER}.down_proj": (EXPERTS, INNER, HIDDEN),
    f"{LAYER}.down_proj_bias": (EXPERTS, HIDDEN),
}
HALVES = tuple(
    Place(
        f"{LAYER}.{expert}.{name}.weight",
        part=((expert, expert + 1), (half * INNER, (half + 1) * INNER), (0, HIDDEN)),
    )
    for half, name in enumerate(("gate_proj", "up_proj"))
    for expert in range(EXPERTS)
)

FOUND = {
    "identity": [
        ("gpt_neox", {"lm_head.weight": (VOCAB, HIDDEN)}, "lm_head.weight", None, (Place("lm_head.weight"),)),
        ("", {"a.b.weight": (4, 4)}, "a.b.weight", (4, 4), (Place("a.b.weight"),)),
        (
            "qwen3_moe",
            ONE_BY_ONE,
            f"{LAYER}.2.up_proj.weight",
            (INNER, HIDDEN),
            (Place(f"{LAYER}.2.up_proj.weight"),),
        ),
    ],
    "renamed": [
        (
            "gpt_neox",
            {"embed_out.weight": (VOCAB, HIDDEN)},
            "lm_head.weight",
            None,
            (Place("embed_out.weight"),),
        ),
        (
            "gpt_neox",
            {"lm_head.weight": (VOCAB, HIDDEN)},
            "embed_out.weight",
            None,
            (Place("lm_head.weight"),),
        ),
        (
            "gpt_neox",
            {"layers.0.attention.dense.weight": (HIDDEN, HIDDEN)},
            "gpt_neox.layers.0.attention.dense.weight",
            None,
            (Place("layers.0.attention.dense.weight"),),
        ),
    ],
    "converted": [
        ("qwen3_moe", ONE_BY_ONE, f"{LAYER}.gate_up_proj", None, HALVES),
        (
            "qwen3_moe",
            FUSED,
            f"{LAYER}.1.up_proj.weight",
            (INNER, HIDDEN),
            (Place(f"{LAYER}.gate_up_proj", at=((1, 2), (INNER, 2 * INNER), (0, HIDDEN))),),
        ),
        (
            "qwen3_moe",
            FUSED,
            f"{LAYER}.2.down_proj.weight",
            (HIDDEN, INNER),
            (Place(f"{LAYER}.down_proj", at=((2, 3), (0, HIDDEN), (0, INNER))),),
        ),
    ],
    "apart": [
        (
            kind,
            ACROSS,
            f"{LAYER}.gate_up_projs.1.weight",
            (2 * INNER, HIDDEN),
            (Place(f"{LAYER}.gate_up_proj", at=((1, 2), (0, HIDDEN), (0, 2 * INNER)), transposed=True),),
        )
        for kind in ("gpt_oss", "")
    ]
    + [
        (
            "gpt_oss",
            ACROSS,
            f"{LAYER}.down_projs.2.bias",
            (HIDDEN,),
            (Place(f"{LAYER}.down_proj_bias", at=((2, 3), (0, HIDDEN))),),
        ),
        (
            "",
            FUSED,
            f"{LAYER}.0.down_proj.weight",
            (HIDDEN, INNER),
            (Place(f"{LAYER}.down_proj", at=((0, 1), (0, HIDDEN), (0, INNER))),),
        ),
        (
            "gpt_oss",
            {"model.layers.0.mlp.router.weight": (EXPERTS, HIDDEN)},
            "model.layers.0.mlp.router.linear.weight",
            (EXPERTS, HIDDEN),
            (Place("model.layers.0.mlp.router.weight"),),
        ),
        (
            "gpt_oss",
            {f"{LAYER}.down_projs.{n}.weight": (HIDDEN, INNER) for n in range(EXPERTS)},
            f"{LAYER}.down_proj",
            None,
            tuple(
                Place(
                    f"{LAYER}.down_projs.{n}.weight",
                    part=((n, n + 1), (0, INNER), (0, HIDDEN)),
                    transposed=True,
                )
                for n in range(EXPERTS)
            ),
        ),
    ],
    "suffix": [
        (
            "",
            {"text.layers.0.q.weight": (8, 4)},
            "layers.0.q.weight",
            (8, 4),
            (Place("text.layers.0.q.weight"),),
        ),
        ("", {"layers.0.q.weight": (8, 4)}, "model.layers.0.q.weight", (4, 8), (Place("layers.0.q.weight"),)),
        (
            "",
            {"text.layers.0.q.weight": (8, 4), "vision.layers.0.q.weight": (6, 6)},
            "layers.0.q.weight",
            (6, 6),
            (Place("vision.layers.0.q.weight"),),
        ),
    ],
}
"""For each layout: family, what is stored, a parameter, the adapter's shape of it, its places."""

CASES = [
    pytest.param(name, *case, id=f"{name}-{case[2]}-{n}")
    for name, cases in FOUND.items()
    for n, case in enumerate(cases)
]


def test_every_layout_has_something_to_find_and_words_for_it():
    assert FOUND.keys() == LAYOUTS.keys()
    assert all(layout.says for layout in LAYOUTS.values())
    assert all(FOUND.values())


@pytest.mark.parametrize(("name", "kind", "shapes", "parameter", "shape", "places"), CASES)
def test_a_layout_finds_its_parameters_and_no_layout_before_it_does(
    name, kind, shapes, parameter, shape, places
):
    base = stored(kind, shapes)
    found = LAYOUTS[name].find(parameter, shape, base)
    assert found is not None
    assert found.rule == name
    assert found.places == places
    assert locate(parameter, shape, base) == found


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize(
    "parameter", ["", "q_proj.weight", "model.layers.0.q_proj", "layers.7.dense.weight", "q"]
)
def test_a_parameter_that_is_nowhere_is_not_guessed(name, kind, parameter):
    shapes = {"model.layers.0.q_proj.weight2": (4, 4), "model.layers.0.qq_proj.weight": (4, 4)}
    assert LAYOUTS[name].find(parameter, (4, 4), stored(kind, shapes)) is None


def test_two_spellings_of_one_tensor_are_no_place():
    base = stored("gpt_neox", {"embed_out.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)})
    base_prefix = stored(
        "gpt_neox", {f"{at}layers.0.attention.dense.weight": (4, 4) for at in ("", "gpt_neox.")}
    )
    assert locate("embed_out.weight", None, base).places == (
        Place("embed_out.weight"),
    )  # it is there by that name
    with pytest.raises(LayoutError, match=r"matches 2 tensors of the base: .*layers\.0"):
        LAYOUTS["renamed"].find("layers.0.attention.dense.weight", None, base_prefix)


def test_one_ending_in_two_towers_is_no_place():
    base = stored("", {f"{tower}.layers.0.q.weight": (8, 4) for tower in ("text", "vision")})
    with pytest.raises(LayoutError, match=r"matches 2 tensors.*text\.layers\.0\.q\.weight, vision\.layers"):
        locate("layers.0.q.weight", (8, 4), base)


def test_a_stack_with_an_expert_missing_is_no_place():
    shapes = {name: shape for name, shape in ONE_BY_ONE.items() if ".1.up_proj" not in name}
    with pytest.raises(LayoutError, match="do not fit together"):
        locate(f"{LAYER}.gate_up_proj", None, stored("qwen3_moe", shapes))


def test_an_expert_of_another_size_is_no_place():
    with pytest.raises(
        LayoutError, match=r"\(5, 16\) is not a part of .*gate_up_proj, which has the shape \(3, 12, 16\)"
    ):
        locate(f"{LAYER}.1.up_proj.weight", (5, HIDDEN), stored("qwen3_moe", FUSED))
