"""Real engines load what was merged into a quantised base: all of it dense, or dense where it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.engines.building import distance
from tests.engines.processor import HAS_AVX512, ROUNDINGS, skip_without_kernel
from tests.engines.stored import FP8_LLAMA, ROWS, STORED, WEIGHTS_ROUNDED, Output, Stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tests.engines.asking import Line
    from tests.engines.families import Engine
    from tests.engines.storing import Merged

pytestmark = pytest.mark.engines
of_every_row = pytest.mark.parametrize(
    ("stored", "output"), [pytest.param(*row, id=f"{row[0].title}-{row[1]}") for row in ROWS]
)
MEANINGLESS = (".weight_shape", ".g_idx")
"""Parts that a reader need not ask for: a shape that others tell, and the order of groups where it is the natural one."""


def difference(merged: Merged, line: Line) -> float:
    """Return by how much an engine's log-probabilities differ at most from those of base and adapter."""
    return max(
        distance(wanted, found)
        for answer, said in zip(merged.wanted, line["answers"], strict=True)
        for wanted, found in zip(answer.numbers(), said["prompt_logprobs"] + said["logprobs"], strict=True)
    )


def tokens(line: Line) -> list[list[int]]:
    return [said["tokens"] for said in line["answers"]]


@pytest.fixture
def loaded(
    said_of_stored: Mapping[Engine, Mapping[str, Line]], record_property: Callable[[str, Any], None]
) -> Callable[[Stored, Output, Engine], Line | None]:
    """Return a function: what, and engine → what the engine says, or nothing where the list says that it cannot."""

    def find(stored: Stored, output: Output, engine: Engine) -> Line | None:
        line = said_of_stored[engine][f"{stored.title}, {output}"]
        record_property("quantised", (stored.title, output, engine))
        if output == "mixed" and engine in stored.unserved:
            record_property("measured", stored.unserved[engine].means)
            assert stored.unserved[engine].says in line["error"]
            return None
        skip_without_kernel(line)
        assert "error" not in line, line["error"]
        return line

    return find


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: stored.title)
def test_the_adapter_matters_and_no_token_is_a_coin_toss(stored, merged):
    about, largest = merged[stored.title], max(WEIGHTS_ROUNDED, stored.mixed_tolerance)
    changes = [
        abs(with_it - without_it)
        for answer, without in zip(about.wanted, about.without, strict=True)
        for with_it, without_it in zip(answer.numbers(), without, strict=True)
    ]
    assert max(changes) > 5 * largest
    assert min(answer.gap for answer in about.wanted) > 2 * largest


@of_every_row
def test_vllm_generates_what_base_and_adapter_do(stored, output, merged, loaded, record_property):
    line = loaded(stored, output, "vllm")
    assert tokens(line) == [answer.tokens for answer in merged[stored.title].wanted]
    found = difference(merged[stored.title], line)
    if stored.fixture == "fp8-block" and output == "mixed" and not HAS_AVX512:
        pytest.skip(
            f"same tokens; without AVX-512 vLLM rounds FP8 in blocks more than was measured ({found:.3f})"
        )
    assert found <= stored.tolerance(output, "vllm") * (ROUNDINGS if output == "mixed" else 1)
    assert bool(line["kernels"]) == (output == "mixed")  # what is dense has none for quantised weights
    record_property("measured", f"{found:.0e}, {'naive product' if line['plain'] else 'native kernel'}")


@of_every_row
def test_lmdeploy_generates_what_base_and_adapter_do(stored, output, merged, loaded, record_property):
    line = loaded(stored, output, "lmdeploy")
    if line is None:
        return
    assert line["unloaded"] == []
    found = difference(merged[stored.title], line)
    if output == "mixed" and "lmdeploy" in stored.otherwise:
        assert found > 2 * WEIGHTS_ROUNDED
        record_property("measured", stored.otherwise["lmdeploy"])
        return
    assert tokens(line) == [answer.tokens for answer in merged[stored.title].wanted]
    assert found <= stored.tolerance(output, "lmdeploy")
    record_property("measured", f"{found:.0e}{', naive product' if output == 'mixed' else ''}")


@of_every_row
def test_turbomind_takes_every_tensor(stored, output, loaded, record_property):
    line = loaded(stored, output, "turbomind")
    if line is None:
        return
    assert [name for name in line["unread"] if not name.endswith(MEANINGLESS)] == []
    assert line["not_finite"] == []
    record_property("measured", f"loader only: all tensors, {line['n_parameters']} parameters")


def test_without_its_exceptions_a_mixed_output_is_loaded_and_wrong(merged, said_of_stored):
    for engine in ("vllm", "lmdeploy"):
        line = said_of_stored[engine]["without exceptions"]
        assert "error" not in line
        assert difference(merged[FP8_LLAMA.title], line) > 2 * WEIGHTS_ROUNDED
