"""A new algebra is one class with its facts and one line in the table: readers state it, and every stage takes it as it is."""

from __future__ import annotations

import ast
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from safetensors.torch import load_file

import lora_merge
from lora_merge.adapters import FORMATS
from lora_merge.core.adapter import Delta
from lora_merge.core.facts import Facts
from lora_merge.core.plan import Merge
from lora_merge.deltas import ALGEBRAS
from lora_merge.deltas.algebra import Unsurveyed


@dataclass(frozen=True, slots=True)
class GainFacts(Facts):
    """Of a weight whose rows are multiplied by the values of one column."""

    column: int
    algebra: Literal["gain"] = "gain"

    def reach(self, *, transposed):
        return "tensor" if transposed else "rows"


class Gain(Unsurveyed):
    """W[i] ← g[i] · W[i]."""

    facts: ClassVar[type[Facts]] = GainFacts

    def __init__(self, delta, factors, stored):
        del stored
        self._gain = factors["gain"].float()[:, delta.facts.column]

    def apply(self, weight, base, start, end):
        del base
        weight.mul_(self._gain[start:end].view(-1, 1))


def as_gain(delta):
    """Return a low-rank delta stated as another one: by a column of its B."""
    return Delta(delta.parameter, GainFacts(1), {"gain": delta.factors["B"]})


@pytest.fixture
def with_gain(monkeypatch):
    """Add the algebra to the table, and let the reader state it."""
    read = FORMATS["peft"]

    def reading(root, ignored=()):
        adapter = read(root, ignored)
        return adapter and replace(adapter, deltas=tuple(map(as_gain, adapter.deltas)))

    monkeypatch.setitem(FORMATS, "peft", reading)
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


@pytest.mark.usefixtures("with_gain")
@pytest.mark.parametrize("options", [(), ("--combine", "ties")], ids=["linear", "ties"])
def test_a_new_algebra_is_merged_and_described_by_the_command(options, pico, pico_adapter, tmp_path, cli):
    base, adapter = pico(), pico_adapter(pico())
    adapters = [part for n in range(2 if options else 1) for part in ("--adapter", f"{adapter}:{n + 1}")]
    result = cli("--base", base, *adapters, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    described = cli("inspect", adapter, "--base", base)
    assert described.exit_code == 0, described.output
    assert "gain" in described.output
    if options:
        return
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    for name in changed:
        b = factors[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"].float()
        assert after[name].equal((before[name].float() * b[:, 1:2]).to(before[name].dtype))


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
