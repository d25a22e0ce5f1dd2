"""A plan is a value: it survives JSON and pickling, whatever it plans."""

from __future__ import annotations

import json
import pickle

import pytest

import lora_merge
from lora_merge.core.plan import Merge
from tests.tampering import edit_json

OPTIONS = {
    "default": {},
    "float32": {"dtype": "float32"},
    "shards": {"max_shard_size": "30KB"},
    "both": {"dtype": "float16", "max_shard_size": 50_000},
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
