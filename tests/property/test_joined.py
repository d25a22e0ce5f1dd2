"""A join of base and adapters is a value, the same for every verb; what only a merge decides is asked of the plan."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import pytest
from pydantic import TypeAdapter

import lora_merge
from lora_merge.core.plan import Merge
from lora_merge.core.report import Silence
from lora_merge.errors import PlanError
from lora_merge.planning import Joined, Policy, Reading, check_fit, make_plan
from lora_merge.planning.run import InputTexts, join_inputs
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json


def joined(base, *adapters, **read) -> Joined:
    """Return adapters, each with the weight 1, on a base."""
    texts = InputTexts(tuple((str(adapter), 1.0) for adapter in adapters), str(base))
    return join_inputs(texts, Reading(**read), Silence()).joined


def case(workshop, name, model):
    """Return a base and an adapter of a kind."""
    return building.case(workshop, next(kind for kind in KINDS if kind.name == name), model, "bfloat16")


JOINED = {
    "a LoRA": ("llama", "LoRA", {}),
    "a tie": ("llama_tied", "modules_to_save", {}),
    "experts": ("gpt_oss", "LoRA on stacked experts (target_parameters), two parameters", {}),
    "PEFT's layers": ("llama", "PiSSA on the original base", {"base_is": "original"}),
    "a larger vocabulary": ("llama", "a larger vocabulary", {}),
    "tokens": ("llama", "trainable_token_indices", {}),
}


@pytest.mark.parametrize(("model", "name", "read"), JOINED.values(), ids=JOINED.keys())
def test_a_join_survives_pickling_and_json_whatever_was_asked_of_it(model, name, read, workshop):
    made = case(workshop, name, model)
    found = joined(made.base, made.adapter, **read)
    assert found.changes
    assert found.skeleton is not None
    assert found.stored.conversion is not None
    assert found.steps
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert set(vars(again)) == {field.name for field in fields(Joined)}  # what was computed does not travel
    kind = TypeAdapter(Joined)
    assert kind.validate_json(kind.dump_json(found)) == found


@pytest.mark.parametrize(("model", "name", "read"), JOINED.values(), ids=JOINED.keys())
def test_a_join_has_the_steps_of_the_plan(model, name, read, workshop):
    made = case(workshop, name, model)
    found = joined(made.base, made.adapter, **read)
    plan = make_plan(found, Policy(allow_untie=True))
    changing = [step for step in plan.steps if step.action in {"merged", "replaced"}]
    placeless = [
        replace(step, writes={role: replace(slot, file="", start=0) for role, slot in step.writes.items()})
        for step in changing
    ]
    assert list(found.steps) == placeless
    assert found.deltas == tuple(
        delta for step in changing if isinstance(step.op, Merge) for delta in step.op.deltas
    )


def test_plans_of_one_join_leave_it_as_it_was(pico, pico_adapter):
    base = pico("llama")
    found = joined(base, pico_adapter(base), pico_adapter(base, r=3))
    before = TypeAdapter(Joined).dump_json(found)
    plans = [
        make_plan(found, policy) for policy in (Policy(), Policy(combine="ties"), Policy(dtype="float32"))
    ]
    assert len({plan.to_json() for plan in plans}) == 3
    assert TypeAdapter(Joined).dump_json(found) == before


SAYING = (
    "import sys, lora_merge; print(*lora_merge.plan(base=sys.argv[1], adapter=sys.argv[2]).issues, sep='\\n')"
)


def test_issues_have_one_order_in_every_process(workshop):
    made = case(workshop, "a larger vocabulary", "llama")
    said = [
        subprocess.run(
            [sys.executable, "-c", SAYING, made.base, made.adapter],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    ]
    assert said[0].count("grows from") == 2
    assert said[0] == said[1]


def test_neither_a_join_nor_what_is_in_it_can_be_set(pico, pico_adapter):
    found = joined(pico("llama"), pico_adapter(pico("llama")))
    change = next(iter(found.changes.values()))
    for value in (found, found.reading, change, found.outline, Policy()):
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)
    assert isinstance(change.deltas, tuple)


def test_what_does_not_fit_is_said_by_the_join_and_by_the_plan_with_what_its_policy_refuses(
    pico, pico_adapter, tampered, tmp_path
):
    base = pico("llama")
    adapter = pico_adapter(base, target_modules=["q_proj"])
    lora_merge.merge(base=base, adapter=adapter, out=tmp_path / "once")
    other = tampered(adapter)
    edit_json(other / "adapter_config.json", r=9)
    found = joined(tmp_path / "once", other)
    errors = [issue for issue in found.issues if issue.severity == "error"]
    assert errors
    assert "merged-before" not in {issue.code for issue in found.issues}
    with pytest.raises(PlanError) as refused:
        check_fit(found)
    assert list(refused.value.issues) == errors
    with pytest.raises(PlanError) as refused:
        make_plan(found, Policy())
    assert [issue.code for issue in refused.value.issues] == ["merged-before", *(one.code for one in errors)]
    with pytest.raises(PlanError) as refused:
        make_plan(found, Policy(allow_again=True))
    assert list(refused.value.issues) == errors


def test_a_tie_that_may_not_be_taken_apart_is_refused_by_the_plan_alone(workshop):
    lora = next(kind for kind in KINDS if kind.name == "LoRA")
    fields = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
    one_end = replace(lora, name="LoRA on one end", fields=fields)
    made = building.case(workshop, one_end, "gemma", "bfloat16")
    found = joined(made.base, made.adapter)
    check_fit(found)
    assert found.tie is not None
    assert found.is_untied
    assert "untied" in {issue.code for issue in found.issues}
    with pytest.raises(PlanError, match="engines tie the embeddings of gemma") as refused:
        make_plan(found, Policy())
    assert [issue.code for issue in refused.value.issues] == ["untie"]
    allowed = make_plan(found, Policy(allow_untie=True))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= {step.slots[0].name for step in allowed.steps}
    assert allowed.issues == found.issues


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        (Policy(), "in-turn"),
        (Policy(combine="ties"), None),
        (Policy(combine="svd"), None),
    ],
)
def test_only_a_plan_says_how_changes_of_several_adapters_become_one(policy, code, workshop):
    made = [case(workshop, name, "llama") for name in ("LoRA", "DoRA on a linear layer")]
    found = joined(made[0].base, *(one.adapter for one in made))
    codes = {issue.code for issue in make_plan(found, policy).issues} - {issue.code for issue in found.issues}
    assert codes == ({code} if code else set())
