"""A plan is a value: it survives JSON and pickling, whatever it plans."""

from __future__ import annotations

import json
import pickle

import pytest

import lora_merge
from lora_merge.core.plan import Merge
from lora_merge.deltas import ALGEBRAS, COMBINATIONS
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json

OPTIONS = {
    "default": {},
    "float32": {"dtype": "float32"},
    "shards": {"max_shard_size": "30KB"},
    "both": {"dtype": "float16", "max_shard_size": "50KB"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("max_shard_size", [None, "40KB"], ids=["one_file", "sharded"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_a_plan_survives_json_and_pickling(family, max_shard_size, options, pico, pico_adapter, tampered):
    made = pico_adapter(pico(family), target_modules="all-linear", use_rslora=True, r=3)
    adapter = tampered(made)
    edit_json(adapter / "adapter_config.json", from_the_future=None)  # a warning travels with the plan
    plan = lora_merge.plan(base=pico(family, max_shard_size=max_shard_size), adapter=adapter, **options)
    assert plan.issues
    assert any(isinstance(step.op, Merge) and step.op.deltas for step in plan.steps)
    text = plan.to_json()
    again = lora_merge.MergePlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert pickle.loads(pickle.dumps(plan)) == plan


PLANNED = {
    "a LoRA on an embedding": ("llama", ["LoRA on an embedding"], {}, {"low_rank"}),
    "a DoRA": ("gpt2", ["DoRA on Conv1D"], {}, {"dora"}),
    "an AdaLoRA": ("resnet", ["AdaLoRA"], {}, {"low_rank"}),
    "BD-LoRA": ("llama", ["BD-LoRA"], {}, {"low_rank"}),
    "an attention that is merged twice": ("siglip", ["LoRA on nn.MultiheadAttention"], {}, {"low_rank"}),
    "experts": (
        "gpt_oss",
        ["LoRA on stacked experts (target_parameters), two parameters"],
        {},
        {"stacked"},
    ),
    "biases": ("llama_biased", ["LoRA with a bias (lora_bias)"], {}, {"low_rank", "addition"}),
    "tokens": ("llama", ["trainable_token_indices"], {}, {"low_rank", "rows"}),
    "PEFT's layers": ("llama", ["LoHa"], {}, {"peft_layer"}),
    "a decomposition": (
        "llama",
        ["PiSSA on the original base"],
        {"base_is": "original"},
        {"peft_layer"},
    ),
    "whole parameters": ("llama_tied", ["modules_to_save"], {}, {"low_rank"}),
    "a larger vocabulary": ("llama", ["a larger vocabulary"], {}, {"low_rank"}),
    "several": ("llama", ["LoRA", "DoRA on a linear layer", "LoHa"], {}, {"low_rank", "dora", "peft_layer"}),
} | {
    method: (
        "llama",
        ["LoRA", "DoRA on a linear layer"],
        {"combine": method, "seed": 5},
        {"low_rank", "dora"},
    )
    for method in COMBINATIONS
}


@pytest.mark.parametrize(("model", "names", "options", "wanted"), PLANNED.values(), ids=PLANNED.keys())
def test_a_plan_of_any_kind_survives_json_and_pickling(model, names, options, wanted, workshop):
    kinds = [next(kind for kind in KINDS if kind.name == name) for name in names]
    cases = [building.case(workshop, kind, model, "bfloat16") for kind in kinds]
    plan = lora_merge.plan(
        base=cases[0].base, adapter=[f"{case.adapter}:0.5" if len(cases) > 1 else case.adapter for case in cases],
        **options,
    )  # fmt: skip
    deltas = [delta for step in plan.steps if isinstance(step.op, Merge) for delta in step.op.deltas]
    assert {delta.algebra for delta in deltas} == wanted
    again = lora_merge.MergePlan.from_json(plan.to_json())
    assert again == plan
    assert [type(step.op) for step in again.steps] == [type(step.op) for step in plan.steps]
    assert again.to_json() == plan.to_json()
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_the_plans_above_have_every_algebra():
    assert set().union(*(wanted for *_, wanted in PLANNED.values())) == set(ALGEBRAS)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"base": 1}', "no json"])
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="MergePlan"):
        lora_merge.MergePlan.from_json(text)


def test_a_step_of_an_unknown_kind_is_refused(pico, pico_adapter):
    plan = lora_merge.plan(base=pico(), adapter=pico_adapter(pico()))
    table = json.loads(plan.to_json())
    table["steps"][0]["op"]["op"] = "guess"
    with pytest.raises(ValueError, match="guess"):
        lora_merge.MergePlan.from_json(json.dumps(table))
