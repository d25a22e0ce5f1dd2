"""Real engines, with no LoRA support switched on, serve a merged checkpoint as base and adapter compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

from tests.engines.building import LOST, NOTICEABLE, TOLERANCE, Prepared, distance
from tests.engines.families import CASES, PLAIN, UNTIED_BY_MERGE, Case, Engine

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.engines
of_every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)

Line = dict[str, Any]
Said = Mapping[Engine, Mapping[str, Line]]


def differences(about: Prepared, line: Line) -> list[float]:
    """Return by how much an engine's log-probabilities differ from those of base and adapter."""
    return [
        distance(wanted, found)
        for answer, said in zip(about.wanted, line["answers"], strict=True)
        for wanted, found in zip(answer.numbers(), said["prompt_logprobs"] + said["logprobs"], strict=True)
    ]


def base_differences(about: Prepared, line: Line) -> float:
    """Return by how much an engine's log-probabilities of the prompts differ from the base's in transformers."""
    return max(
        distance(wanted, found)
        for without, said in zip(about.without, line["answers"], strict=True)
        for wanted, found in zip(without, said["prompt_logprobs"], strict=False)  # then come generated tokens
    )


def same_tokens(about: Prepared, line: Line) -> bool:
    """Return whether an engine generates what base and adapter do."""
    return [said["tokens"] for said in line["answers"]] == [answer.tokens for answer in about.wanted]


@pytest.fixture
def served(said: Said, record_property: Callable[[str, Any], None]) -> Callable[[Case, Engine], Line | None]:
    """Return a function (case, engine) → what the engine says, or nothing where the list says that it cannot."""

    def find(case: Case, engine: Engine) -> Line | None:
        line = said[engine][case.name]
        record_property("engine", (case.model.name, case.adapter, engine))
        if engine in case.unserved:
            record_property("measured", case.unserved[engine].means)
            assert case.unserved[engine].says in line["error"]
            return None
        assert "error" not in line, line["error"]
        return line

    return find


@of_every_case
def test_the_adapter_matters_and_no_token_is_a_coin_toss(case, prepared):
    about = prepared[case.name]
    changes = [
        abs(with_it - without_it)
        for answer, without in zip(about.wanted, about.without, strict=True)
        for with_it, without_it in zip(answer.numbers(), without, strict=True)
    ]
    assert max(changes) > NOTICEABLE
    assert min(answer.gap for answer in about.wanted) > 2 * TOLERANCE


@of_every_case
@pytest.mark.parametrize("engine", ["vllm", "lmdeploy"])
def test_an_engine_generates_what_base_and_adapter_do(case, engine, prepared, said, served, record_property):
    line = served(case, engine)
    if line is None:
        return
    assert line.get("unloaded", []) == []
    if engine in case.otherwise:
        assert base_differences(prepared[case.name], said[engine][f"base of {case.name}"]) > TOLERANCE
        reason = f"; {case.otherwise[engine]}" if case.otherwise[engine] else ""
        record_property("measured", f"loads it, but differs from transformers on the base alone{reason}")
        return
    assert same_tokens(prepared[case.name], line)
    difference = max(differences(prepared[case.name], line))
    assert difference <= TOLERANCE
    record_property("measured", f"{difference:.1e}")


@of_every_case
def test_turbomind_takes_every_tensor(case, served, record_property):
    line = served(case, "turbomind")
    if line is None:
        return
    assert line["unread"] == []
    assert line["not_finite"] == []
    record_property("measured", f"all tensors, {line['n_parameters']} parameters")


# What these checks notice, and engines do not.


def test_the_base_alone_is_noticed(prepared, said):
    for engine in ("vllm", "lmdeploy"):
        assert max(differences(prepared[PLAIN.name], said[engine]["the base alone"])) > NOTICEABLE
    assert said["turbomind"]["the base alone"]["digest"] != said["turbomind"][PLAIN.name]["digest"]


def test_a_lost_tensor_is_nothing_to_vllm_but_is_noticed(prepared, said):
    line = said["vllm"]["a tensor short"]
    assert "error" not in line
    assert max(differences(prepared[PLAIN.name], line)) > NOTICEABLE  # it may be anything, NaN too


def test_a_lost_tensor_is_nothing_to_lmdeploy_but_is_noticed(said):
    line = said["lmdeploy"]["a tensor short"]
    assert "error" not in line
    assert line["unloaded"] == [LOST]


def test_turbomind_raises_when_a_tensor_is_lost(said):
    assert LOST.removesuffix(".weight") in said["turbomind"]["a tensor short"]["error"]


def test_a_config_that_says_tied_makes_lmdeploy_drop_the_head_and_vllm_looks_at_the_tensors(prepared, said):
    wanted, wrong = prepared[UNTIED_BY_MERGE.name], "said to be tied"
    assert all("error" not in lines[wrong] for lines in said.values())
    assert max(differences(wanted, said["vllm"][wrong])) <= TOLERANCE
    assert max(differences(wanted, said["lmdeploy"][wrong])) > NOTICEABLE
    assert said["turbomind"][wrong]["unread"] == ["lm_head.weight"]


def test_shards_are_served_as_one_file_is(prepared, said):
    line = said["vllm"]["the merged one in shards"]
    assert max(differences(prepared[PLAIN.name], line)) <= TOLERANCE
    assert said["turbomind"]["the merged one in shards"]["digest"] == said["turbomind"][PLAIN.name]["digest"]


def test_of_two_checkpoints_in_one_place_the_engines_of_lmdeploy_read_different_ones(said):
    both, alone = "two checkpoints in one place", "the base alone"
    assert said["lmdeploy"][both]["answers"] == said["lmdeploy"][alone]["answers"]
    assert said["turbomind"][both]["digest"] == said["turbomind"][PLAIN.name]["digest"]


def test_what_cannot_be_loaded_costs_no_other_checkpoint_its_answer(said):
    for lines in said.values():
        assert lines["no checkpoint"]["error"]
        assert "error" not in lines["the base alone"]
