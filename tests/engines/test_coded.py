"""Real engines load outputs with new codes, and compute with the values that we decode from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from tests.engines.asking import Asker, job
from tests.engines.building import distance
from tests.engines.coded import CODED, CODED_ROWS, Coded, Rounding
from tests.engines.coding import Made, prepare_coded
from tests.engines.conftest import ABOUT_QUANTISED, DTYPES
from tests.engines.processor import skip_without_kernel
from tests.engines.stored import WEIGHTS_ROUNDED
from tests.engines.test_quantised import MEANINGLESS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.engines.asking import Line
    from tests.engines.families import Engine

pytestmark = pytest.mark.engines

NOT_ASKED = "asked when the table is written: make engines-table"

of_every_row = pytest.mark.parametrize(
    ("about", "rounding"), [pytest.param(*row, id=f"{row[0].title}-{row[1]}") for row in CODED_ROWS]
)


@pytest.fixture(scope="module")
def coded(engines_python, request, tmp_path_factory, cli) -> Mapping[tuple[str, Rounding], Made]:
    """Return the outputs that are asked about, by title and rounding: all of them if the table is to be written."""
    root, is_table = tmp_path_factory.mktemp("coded"), request.config.getoption("--write-engines-table")
    return {
        (about.title, rounding): made
        for about in CODED
        if is_table or about.is_always_asked
        for rounding, made in prepare_coded(root, about, cli).items()
    }


@pytest.fixture(scope="module")
def said(coded, engines_python, tmp_path_factory) -> Mapping[Engine, Mapping[tuple[str, Rounding], Line]]:
    """Return what every engine says about every output."""
    jobs = [job(made.out, prompts=made.prompts + made.learned, dtype="bfloat16") for made in coded.values()]
    asker = Asker(engines_python, tmp_path_factory.mktemp("said-of-coded"))
    return {
        engine: dict(zip(coded, asker.ask(program, DTYPES[engine], jobs), strict=True))
        for engine, program in ABOUT_QUANTISED.items()
    }


@pytest.fixture
def loaded(
    said, record_property: Callable[[str, Any], None]
) -> Callable[[Coded, Rounding, Engine], Line | None]:
    """Return a function: what, and engine → what the engine says, or nothing where the list says that it cannot."""

    def find(about: Coded, rounding: Rounding, engine: Engine) -> Line | None:
        if (about.title, rounding) not in said[engine]:
            pytest.skip(NOT_ASKED)
        line = said[engine][about.title, rounding]
        record_property("coded", (about.title, rounding, engine))
        if engine in about.unserved:
            record_property("measured", about.unserved[engine].means)
            assert about.unserved[engine].says in line["error"]
            return None
        skip_without_kernel(line)
        assert "error" not in line, line["error"]
        return line

    return find


class Found(NamedTuple):
    """What an engine computes with an output."""

    largest: float
    """By how much log-probabilities differ at most from those of the decoded output."""

    mean: float
    kept: float
    """The share of what was learned that is left."""


def compare(made: Made, line: Line) -> Found:
    """Compare log-probabilities of prompts, of what follows, and of what was learned."""
    answers, learned = line["answers"][: len(made.prompts)], line["answers"][len(made.prompts) :]
    assert [said["tokens"] for said in answers] == [answer.tokens for answer in made.wanted]
    of_learned = torch.tensor([said["prompt_logprobs"] for said in learned])
    pairs = [
        pair
        for answer, said in zip(made.wanted, answers, strict=True)
        for pair in zip(answer.numbers(), said["prompt_logprobs"] + said["logprobs"], strict=True)
    ]
    pairs += zip(made.decoded.flatten().tolist(), of_learned.flatten().tolist(), strict=True)
    distances = [distance(*pair) for pair in pairs]
    return Found(max(distances), sum(distances) / len(distances), made.kept(of_learned))


@of_every_row
def test_vllm_computes_with_the_values_that_we_decode(about, rounding, coded, loaded, record_property):
    line = loaded(about, rounding, "vllm")
    found = compare(coded[about.title, rounding], line)
    assert line["kernels"]
    kernel = "naive product" if line["plain"] else "native kernel"
    record_property("measured", f"{found.largest:.0e}, {kernel}; {found.kept:.0%} kept")
    assert found.largest <= about.tolerance.largest
    assert found.mean <= about.tolerance.mean


@of_every_row
def test_lmdeploy_computes_with_the_values_that_we_decode(about, rounding, coded, loaded, record_property):
    line = loaded(about, rounding, "lmdeploy")
    if line is None:
        return
    assert line["unloaded"] == []
    found = compare(coded[about.title, rounding], line)
    record_property("measured", f"{found.largest:.0e}, naive product; {found.kept:.0%} kept")
    assert found.largest <= WEIGHTS_ROUNDED


@of_every_row
def test_turbomind_takes_every_tensor(about, rounding, loaded, record_property):
    line = loaded(about, rounding, "turbomind")
    if line is None:
        return
    assert [name for name in line["unread"] if not name.endswith(MEANINGLESS)] == []
    assert line["not_finite"] == []
    record_property("measured", f"loader only: all tensors, {line['n_parameters']} parameters")


@pytest.mark.parametrize("about", [about for about in CODED if about.base], ids=lambda about: about.title)
def test_in_an_engine_too_the_rounding_for_the_adapter_keeps_more(about, coded, said):
    if (about.title, "adapter") not in coded:
        pytest.skip(NOT_ASKED)
    kept = {}
    for rounding in about.roundings:
        made, line = coded[about.title, rounding], said["vllm"][about.title, rounding]
        skip_without_kernel(line)
        kept[rounding] = compare(made, line).kept
    assert kept["adapter"] > 0.6
    # Of eight bits, little is lost either way, and bfloat16 has its own noise.
    assert kept["adapter"] > kept["nearest"] - 0.1
