"""Engines serve an adapter beside its base: as ``lora-merge inspect`` says, and once converted as PEFT computes it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest

from lora_merge.cli import exits
from tests.engines.adapters import ADAPTERS, SERVERS, VLLM_RANKS, Adapted, Server
from tests.engines.building import NOTICEABLE, Answer, distance
from tests.engines.families import LLAMA, LLAMA_TIED
from tests.engines.serving import SERVED_TOLERANCE, needed_rank

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.engines.asking import Line

pytestmark = pytest.mark.engines

PAIRS = [(about, server) for about in ADAPTERS for server in about.asked]
HELPED = [(about, server) for about, server in PAIRS if server not in about.lost_on]
BY_NAME = {about.name: about for about in ADAPTERS}


def over(pairs: list[tuple[Adapted, Server]]) -> Any:
    """Return a mark: these adapters in these engines."""
    cases = [pytest.param(about, server, id=f"{about.name}-{server}") for about, server in pairs]
    return pytest.mark.parametrize(("about", "server"), cases)


def of(*names: str) -> Any:
    """Return a mark: these adapters."""
    return pytest.mark.parametrize("about", [BY_NAME[name] for name in names], ids=lambda about: about.name)


def differences(wanted: list[Answer], line: Line) -> list[float]:
    """Return by how much an engine's log-probabilities differ."""
    assert "error" not in line, line["error"]
    return [
        distance(right, found)
        for answer, said in zip(wanted, line["answers"], strict=True)
        for right, found in (
            *zip(answer.logprobs, said["logprobs"], strict=True),
            *zip(answer.prompt_logprobs, said.get("prompt_logprobs", ()), strict=False),  # vLLM is not asked
        )
    ]


def tokens(answers: list[Any]) -> list[list[int]]:
    """Return what is generated."""
    return [answer["tokens"] if isinstance(answer, dict) else answer.tokens for answer in answers]


def is_right(wanted: list[Answer], line: Line) -> bool:
    """Return whether an engine says what PEFT does."""
    close = max(differences(wanted, line)) <= SERVED_TOLERANCE
    return close and tokens(line["answers"]) == tokens(wanted)


def done(wanted: list[Answer], line: Line) -> str:
    """Return what an engine did with an adapter; nothing lies between right and wrong."""
    if "error" in line:
        return "refused"
    if is_right(wanted, line):
        return "right"
    assert max(differences(wanted, line)) > NOTICEABLE
    return "wrong"


def inspected(cli: Any, server: Server, *arguments: object) -> tuple[str, list[Mapping[str, Any]]]:
    """Return the verdict of ``inspect``, and the obstacles."""
    result = cli("inspect", *arguments, "--engine", server, "--json")
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)["engines"]
    return report["verdict"], report["obstacles"]


@of(*BY_NAME)
def test_the_adapter_matters_and_no_token_is_a_coin_toss(about, shown):
    one = shown[about.name]
    for answers in (one.wanted, *one.wanted_of_converted.values()):
        assert min(answer.gap for answer in answers) > 2 * SERVED_TOLERANCE
    changes = [
        abs(with_it - without_it)
        for answer, without in zip(one.wanted, one.without, strict=True)
        for with_it, without_it in zip(answer.numbers(), without, strict=True)
    ]
    assert max(changes) > NOTICEABLE


# As it is.


@over(PAIRS)
def test_what_an_engine_makes_of_an_adapter_as_it_is(about, server, shown, said_with):
    line, wanted = said_with[server][about.name, "original"], shown[about.name].wanted
    expected = about.makes(server)
    assert done(wanted, line) == expected.deed, line.get("error")
    assert expected.says in line.get("error", "")


@over([(about, server) for about, server in PAIRS if server not in about.unseen])
def test_inspect_says_of_an_engine_what_it_does(about, server, shown, said_with, cli):
    one = shown[about.name]
    verdict, obstacles = inspected(cli, server, one.original, "--base", one.base, *about.base_is)
    deed = done(one.wanted, said_with[server][about.name, "original"])
    effects = {obstacle["effect"] for obstacle in obstacles}
    if verdict == "no":
        assert deed == ("refused" if "refused" in effects else "wrong"), obstacles
    elif verdict == "with an option":
        assert deed == "refused"
        told = f"vLLM's --max-lora-rank {needed_rank(one.original)}"
        assert [obstacle["cures"][0] for obstacle in obstacles] == [told]
        assert done(one.wanted, said_with[server][about.name, "told"]) == "right"
    else:
        assert (verdict, deed) == ("yes", "right")


# A rule of one family is known only with the base.
@over([(about, server) for about, server in PAIRS if about.model in {LLAMA, LLAMA_TIED}])
def test_inspect_promises_nothing_that_only_the_base_tells(about, server, shown, said_with, cli):
    one = shown[about.name]
    verdict, _ = inspected(cli, server, one.original)
    deed = done(one.wanted, said_with[server][about.name, "original"])
    assert verdict != "yes" or deed == "right"


@of("Llama, last layer only", "Llama, first layer only")
def test_lmdeploy_serves_what_memory_holds_where_a_layer_has_no_tensors(about, said_with):
    line = said_with["lmdeploy"][about.name, "original"]
    (layer,) = {0, 1} - set(about.lora["layers_to_transform"])
    assert line["unloaded"]
    assert all(f".layers.{layer}." in name and ".lora_adapters." in name for name in line["unloaded"])


# Converted.


@over(HELPED)
def test_a_converted_adapter_is_served_as_peft_serves_the_original(about, server, shown, said_with):
    one = shown[about.name]
    assert one.conversions[server].exit_code == exits.OK, one.conversions[server].output
    line = said_with[server][about.name, "converted"]
    wanted = one.wanted_of_converted[server]
    assert line.get("unloaded", []) == []
    assert max(differences(wanted, line)) <= SERVED_TOLERANCE
    assert tokens(line["answers"]) == tokens(wanted)


@over([pair for pair in PAIRS if pair not in HELPED])
def test_where_no_conversion_helps_there_is_none(about, server, shown):
    result = shown[about.name].conversions[server]
    assert result.exit_code == exits.PLAN, result.output
    assert "merge" in result.output


@over(HELPED)
def test_inspect_says_that_an_engine_serves_what_was_converted_for_it(about, server, shown, cli):
    one = shown[about.name]
    assert server in one.converted, one.conversions[server].output
    verdict, obstacles = inspected(cli, server, one.converted[server], "--base", one.base)
    fits = server != "vllm" or needed_rank(one.converted[server]) == VLLM_RANKS[0]
    assert verdict == ("yes" if fits else "with an option"), obstacles


@over(PAIRS)
def test_inspect_names_a_conversion_where_one_helps(about, server, shown, cli):
    one = shown[about.name]
    _, obstacles = inspected(cli, server, one.original, "--base", one.base, *about.base_is)
    converts = [any(" convert " in cure for cure in obstacle["cures"]) for obstacle in obstacles]
    assert all(converts) == (server not in about.lost_on), obstacles


@over(HELPED)
def test_a_conversion_that_inspect_names_is_carried_out_as_it_stands(
    about, server, shown, cli, tmp_path, monkeypatch
):
    one = shown[about.name]
    _, obstacles = inspected(cli, server, one.original, "--base", one.base, *about.base_is)
    named = {cure for obstacle in obstacles for cure in obstacle["cures"] if " convert " in cure}
    monkeypatch.chdir(tmp_path)
    for n, command in enumerate(sorted(named)):
        rank_given = command.replace("--rank N", "--rank 16")  # N is the user's to choose
        result = cli(*shlex.split(rank_given)[1:-1], f"out-{n}")
        assert result.exit_code == exits.OK, f"{command}\n{result.output}"
        verdict, left = inspected(cli, server, f"out-{n}", "--base", one.base)
        assert verdict != "no", left


@pytest.mark.parametrize("server", SERVERS)
@of("Llama, rank 32 to 16")
def test_a_lower_rank_is_another_adapter_where_something_is_dropped(about, server, shown, said_with):
    line = said_with[server][about.name, "converted"]
    assert max(differences(shown[about.name].wanted, line)) > NOTICEABLE


@of(*(about.name for about, server in HELPED if server == "lmdeploy"))
def test_lmdeploy_serves_all_converted_adapters_of_a_base_at_once(about, shown, said_with):
    one = shown[about.name]
    assert "lmdeploy" in one.converted, one.conversions["lmdeploy"].output
    assert is_right(one.wanted_of_converted["lmdeploy"], said_with["lmdeploy"][about.name, "together"])
