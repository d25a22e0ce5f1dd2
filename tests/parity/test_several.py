"""Several adapters on one base, with weights: what PEFT computes with all of them active.

A weight multiplies the adapter's scale. For plain LoRA the deltas add up, W' = W + Σ wᵢ·sᵢ·Bᵢ·Aᵢ. DoRA acts on what
the adapters before it have made of the weight, with the norm of the base's own weight:
Wᵢ = m/‖W + dᵢ‖·(Wᵢ₋₁ + dᵢ), dᵢ = wᵢ·sᵢ·Bᵢ·Aᵢ. So the order counts.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity import building
from tests.parity.kinds import Kind

# As in test_kinds.py: the sum has a few terms more.
FLOAT32_TOLERANCE = 1e-5
LEAST_EFFECT = 0.05


def lora(name: str, *models: str, **fields: Any) -> Kind:
    """Return a kind of LoRA; each has its own factors, because they differ in shape or in scale."""
    scale = fields.pop("scale", 0.1)
    return Kind(name, "LoRA family", "LORA", "LoraConfig", fields, models or ("llama",), scale=scale)


PLAIN = lora("plain", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
RANK_STABLE = lora("rslora", r=7, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "up_proj"])
PATTERNS = lora(
    "patterns",
    r=3,
    lora_alpha=9,
    rank_pattern={"q_proj": 5},
    target_modules=["q_proj", "down_proj", "o_proj"],
)
DORA = lora("dora", r=4, lora_alpha=6, use_dora=True, target_modules=["q_proj", "down_proj"])
OTHER_DORA = lora("dora, other", r=5, lora_alpha=4, use_dora=True, target_modules=["q_proj", "o_proj"])
CONV1D = lora("conv1d", "gpt2", r=4, lora_alpha=6, target_modules=["c_attn", "c_fc"])
OTHER_CONV1D = lora("conv1d, other", "gpt2", r=6, lora_alpha=5, target_modules=["c_attn"])

CASES: dict[str, list[tuple[Kind, float]]] = {
    "one_with_a_weight": [(PLAIN, 0.5)],
    "two": [(PLAIN, 1), (RANK_STABLE, 1)],
    "two_with_weights": [(PLAIN, 0.5), (RANK_STABLE, 1.75)],
    "two_that_share_nothing_but_a_module": [(RANK_STABLE, 1), (PATTERNS, 0.5)],
    "one_taken_away": [(PLAIN, 1), (PATTERNS, -0.75)],
    "three": [(PLAIN, 0.25), (RANK_STABLE, 0.5), (PATTERNS, 1)],
    "the_same_twice": [(PLAIN, 0.25), (PLAIN, 0.5)],
    "a_dora_with_a_weight": [(DORA, 0.5)],
    "a_dora_after_a_lora": [(PLAIN, 0.5), (DORA, 1)],
    "a_dora_before_a_lora": [(DORA, 1), (PLAIN, 0.5)],
    "two_doras": [(DORA, 0.5), (OTHER_DORA, 1)],
    "two_on_conv1d": [(CONV1D, 0.5), (OTHER_CONV1D, -1)],
}
every_case = pytest.mark.parametrize("weighted", CASES.values(), ids=CASES.keys())


@pytest.fixture
def merge(cli, tmp_path):
    """Return a function (base, arguments of ``--adapter``) → the directory that the command wrote."""

    def run(base, *adapters):
        options = [option for adapter in adapters for option in ("--adapter", adapter)]
        result = cli("--base", base, *options, "--out", tmp_path / "merged")
        assert result.exit_code == 0, result.output
        return tmp_path / "merged"

    return run


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def all_active(cases, weights):
    """Return PEFT's model with every adapter active, its scale multiplied by its weight."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = [f"adapter{n}" for n in range(len(cases))]
    model = PeftModel.from_pretrained(cases[0].plain(), cases[0].adapter, adapter_name=names[0])
    for name, case in zip(names[1:], cases[1:], strict=True):
        model.load_adapter(case.adapter, adapter_name=name)
    model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return model.eval()


@every_case
def test_the_merged_model_computes_what_all_of_them_compute_together(weighted, workshop, merge):
    model = weighted[0][0].models[0]
    cases = [building.case(workshop, kind, model, "float32") for kind, _ in weighted]
    weights = [weight for _, weight in weighted]
    wanted = building.compute(all_active(cases, weights), model)
    assert off_by(building.compute(cases[0].plain(), model), wanted) > LEAST_EFFECT
    if len(cases) > 1:
        without = building.compute(all_active(cases[:-1], weights[:-1]), model)
        assert off_by(without, wanted) > LEAST_EFFECT
    arguments = [f"{case.adapter}:{weight:g}" for case, weight in zip(cases, weights, strict=True)]
    out = merge(cases[0].base, *arguments)
    assert off_by(building.compute(building.load_afresh(out, model), model), wanted) <= FLOAT32_TOLERANCE


def test_a_weight_that_is_not_given_is_one(workshop, merge):
    cases = [building.case(workshop, kind, "llama", "float32") for kind in (PLAIN, RANK_STABLE)]
    wanted = building.compute(all_active(cases, [1, 0.5]), "llama")
    out = merge(cases[0].base, cases[0].adapter, f"{cases[1].adapter}:0.5")
    got = building.compute(building.load_afresh(out, "llama"), "llama")
    assert off_by(got, wanted) <= FLOAT32_TOLERANCE


def test_the_order_of_a_lora_and_a_dora_counts(workshop):
    cases = [building.case(workshop, kind, "llama", "float32") for kind in (PLAIN, DORA)]
    one_way = building.compute(all_active(cases, [1, 1]), "llama")
    other_way = building.compute(all_active(cases[::-1], [1, 1]), "llama")
    assert off_by(one_way, other_way) > 100 * FLOAT32_TOLERANCE


def test_a_weight_of_one_writes_what_no_weight_writes(workshop, cli, stored, tmp_path):
    case = building.case(workshop, PLAIN, "llama", "bfloat16")
    for name, argument in (("plain", f"{case.adapter}"), ("weighted", f"{case.adapter}:1")):
        result = cli("--base", case.base, "--adapter", argument, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert stored(tmp_path / "weighted") == stored(tmp_path / "plain")
