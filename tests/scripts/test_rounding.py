"""The page on rounding says what was measured, and what is measured is what its names say."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from rounded import explained, grids, merging, models, rule, tables
from rounded.measuring import arrived, gain_kept, moved

ROOT = Path(__file__).parents[2]
MEASURED = json.loads((ROOT / "docs" / "rounding.json").read_text())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("rounding_script", ROOT / "scripts" / "rounding.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def weight():
    """W, A and the change of a weight whose adapter sees two of four inputs."""
    before = torch.tensor([[1.0, -2.0, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0]])
    factor = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])
    delta = torch.tensor([[3.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    return before, factor, delta


def test_nothing_arrives_where_the_base_comes_back(weight):
    before, factor, delta = weight
    found = arrived(before, before, delta, factor)
    assert (found.kept, found.in_span, found.noise) == pytest.approx((0, 1, 5))


def test_all_arrives_where_only_what_the_adapter_does_not_see_is_off(weight):
    before, factor, delta = weight
    noise = torch.tensor([[0.0, 0.0, 1.0, -2.0], [0.0, 0.0, 2.0, 0.0]])
    found = arrived(before, before + delta + noise, delta, factor)
    assert (found.kept, found.in_span, found.noise) == pytest.approx((1, 0, 3))


def test_an_error_that_the_adapter_sees_counts_even_beside_the_change(weight):
    before, factor, delta = weight
    error = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    found = arrived(before, before + delta + error, delta, factor)
    assert (found.kept, found.in_span, found.noise) == pytest.approx((1, 3 / 5, 3))


def test_gain_is_a_share_of_what_the_unmerged_model_gains():
    assert gain_kept(3.0, 1.0, 3.0) == 0
    assert gain_kept(3.0, 1.0, 2.5) == 0.25
    assert gain_kept(3.0, 1.0, 1.0) == 1


def test_logits_are_compared_along_the_effect_and_beside_it():
    base, exact = torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    found = moved(base, exact, torch.tensor([[1.0, 1.0]]))
    assert found.kept == pytest.approx(0.5)
    assert found.error == pytest.approx(2**0.5 / 2)


def test_the_plain_rule_keeps_the_sum_that_nearest_loses():
    wanted, nearest, adapter = explained.rounded_rows()
    assert nearest == list(explained.BEFORE)
    assert sum(adapter) == sum(wanted)
    assert sorted(new - old for new, old in zip(adapter, explained.BEFORE, strict=True)) == [0] * 9 + [1] * 3


def test_the_plain_rule_is_nearest_where_all_directions_are_free():
    wanted = [0.4, 1.6, -0.7, 2.2]
    assert rule.for_adapter(wanted, [0.0] * 4, 0.1) == rule.nearest(wanted) == [0, 2, -1, 2]


def test_a_merge_is_measured_from_what_it_wrote(tmp_path, monkeypatch):
    monkeypatch.setattr(grids, "OUT", 128)
    monkeypatch.setattr(grids, "IN", 256)
    monkeypatch.setattr(grids, "RANK", 2)
    found = {row["rounding"]: row for row in grids.rows(tmp_path, (("int4-g32", 1e-3),))}
    assert tuple(found) == merging.ROUNDINGS
    assert found["nearest"]["kept"] < 0.3
    assert found["nearest"]["in_span"] > 0.7
    assert found["nearest"]["noise"] == 1
    assert found["adapter"]["kept"] > 0.95
    assert found["adapter"]["in_span"] < 0.1 < found["stochastic"]["in_span"]


def test_every_case_was_measured():
    by_grid = {(row["grid"], row["delta"], row["rounding"]) for row in MEASURED["grids"]}
    assert by_grid == {(*case, rounding) for case in grids.CASES for rounding in merging.ROUNDINGS}
    on_write = {(row["grid"], row["delta"], row["rounding"]) for row in MEASURED["on_write"]}
    assert on_write == {(*case, rounding) for case in grids.ON_WRITE for rounding in merging.ROUNDINGS}
    trained = [(row["grid"], row["learning_rate"], row["seed"]) for row in MEASURED["trained"]]
    assert trained == [(*case, seed) for case in models.CASES for seed in models.SEEDS]
    assert len(MEASURED["scaled"]) == len(models.WEIGHTS) * len(merging.ROUNDINGS)


def test_gains_follow_from_the_losses():
    for row in MEASURED["trained"]:
        loss = row["loss"]
        digits = 2e-4 / (loss["base"] - loss["unmerged"])  # losses are written with five
        for rounding, gain in row["gain_kept"].items():
            assert gain_kept(loss["base"], loss["unmerged"], loss[rounding]) == pytest.approx(
                gain, abs=digits
            )


def test_the_rule_keeps_the_gain_wherever_nearest_does_not():
    for _, _, rows in tables.cases(MEASURED["trained"]):
        for row in rows:
            assert row["gain_kept"]["nearest"] > 0.7 or row["gain_kept"]["adapter"] >= 0.95


def test_the_first_sentences_of_the_page_hold():
    kept = {
        (row["grid"], row["delta"]): row["kept"] for row in MEASURED["grids"] if row["rounding"] == "nearest"
    }
    lost = [1 - kept[case] for case in (("bf16", 1e-5), ("fp8", 1e-4), ("int4-g32", 3e-4))]
    assert lost == pytest.approx([0.71, 0.81, 1.0], abs=5e-3)
    assert all(row["kept"] > 0.998 for row in MEASURED["grids"] if row["rounding"] == "adapter")


def test_the_page_has_the_tables_of_what_was_measured():
    page = (ROOT / "docs" / "rounding.md").read_text()
    assert tables.with_blocks(page, MEASURED) == page


def test_the_pictures_show_what_was_measured(script):
    for name, picture in script.pictures(MEASURED).items():
        assert (ROOT / "docs" / name).read_text() == picture


def test_tables_fit_into_a_terminal():
    for source, make in tables.TABLES.values():
        assert all(len(line) <= 80 for line in tables.text(make(MEASURED[source])).splitlines())


def test_a_page_without_a_marker_is_refused():
    with pytest.raises(ValueError, match="grids: begin"):
        tables.with_blocks("no markers", MEASURED)
