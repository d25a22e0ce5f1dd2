"""A new algebra is one class with its facts and one line in the table: readers state it, and a plan takes it as it is."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

import lora_merge
from lora_merge.adapters import FORMATS
from lora_merge.core.plan import Merge
from lora_merge.deltas import ALGEBRAS
from tests.toys.algebra import Gain, GainFacts, stating_gains


@pytest.fixture
def with_gain(monkeypatch):
    """Add the algebra to the table, and let the reader state it."""
    monkeypatch.setitem(FORMATS, "peft", stating_gains(FORMATS["peft"]))
    monkeypatch.setitem(ALGEBRAS, "gain", Gain)


@pytest.mark.usefixtures("with_gain")
def test_a_new_algebra_is_planned_and_survives_json_and_pickling(pico, pico_adapter):
    plan = lora_merge.plan(base=pico(), adapter=pico_adapter(pico()))
    deltas = [delta for step in plan.steps if isinstance(step.op, Merge) for delta in step.op.deltas]
    assert {delta.facts for delta in deltas} == {GainFacts(1)}
    assert plan.summary().kinds == {"gain": len(deltas)}
    again = lora_merge.MergePlan.from_json(plan.to_json())
    assert again == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_plan_of_an_algebra_that_is_not_in_the_table_is_refused(pico, pico_adapter, monkeypatch):
    text = lora_merge.plan(base=pico(), adapter=pico_adapter(pico())).to_json()
    with pytest.raises(ValueError, match="MergePlan"):
        lora_merge.MergePlan.from_json(text.replace('"algebra": "low_rank"', '"algebra": "gain"'))


def test_no_room_compares_the_names_of_algebras():
    """What kind of change a delta is, its facts say: a comparison by name would miss an algebra that is added."""
    found = []
    for path in sorted(Path(lora_merge.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = [*ast.walk(node)] if isinstance(node, ast.Compare | ast.Match) else []
            names = {part.value for part in parts if isinstance(part, ast.Constant)} & ALGEBRAS.keys()
            if names and any(isinstance(part, ast.Attribute) and part.attr == "algebra" for part in parts):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
