"""Charts, data and places of pages, without a run."""

from __future__ import annotations

import json
import math
import random

import pytest

from lora_merge.batches.reports import BatchReport, JobReport
from lora_merge.core.report import Finding, Proof, error
from lora_merge.core.tensor import Survival
from lora_merge.drawing.scale import DARK, LIGHT, contrast, ink_on, step_of
from lora_merge.errors import PlanError, RequestError
from lora_merge.reporting import report_html, write_report
from lora_merge.reporting.command import command_text
from lora_merge.reporting.data import MOST_BYTES, embedded
from lora_merge.reporting.maps import kept_chart, points_of_survival, size_chart
from lora_merge.reporting.page_file import checked_place
from lora_merge.reporting.rendering import DARK_COLOURS, LIGHT_COLOURS
from tests.pages import data_of


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_every_step_of_the_scale_has_ink_that_can_be_read(colours):
    assert [colour for colour in colours if contrast(ink_on(colour), colour) < 4.5] == []


@pytest.mark.parametrize("colours", [LIGHT_COLOURS, DARK_COLOURS], ids=["light", "dark"])
def test_every_ink_can_be_read_on_page_and_panel(colours):
    for paper in ("page", "panel"):
        for ink in ("ink", "faint", "accent", "good", "warn", "bad"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def test_steps_grow_with_the_value():
    draw = random.Random(1)
    values = sorted(draw.uniform(-1, 2) for _ in range(200))
    steps = [step_of(value, 0.0, 1.0) for value in values]

    assert steps == sorted(steps)
    assert {min(steps), max(steps)} == {0, 9}
    assert step_of(math.nan, 0, 1) is step_of(math.inf, 0, 1) is None


def survival_of(*names, **fields):
    return {name: Survival(2.0, 0.5, 0.1, 0.2, **fields) for name in names}


def test_experts_share_a_cell_that_shows_their_mean():
    survival = {
        f"model.layers.{layer}.mlp.experts.{n}.up_proj.weight": Survival(1.0, 0.1 * (n + 1), 0.0, 0.0)
        for layer in range(3)
        for n in range(4)
    }

    chart = size_chart(points_of_survival(survival, {}), "map")

    assert [(cell.row, cell.column) for cell in chart.map.cells] == [(0, 0), (0, 1), (0, 2)]
    for cell in chart.map.cells:
        assert cell.value == pytest.approx(0.25)
        assert "4 modules" in cell.label


def test_the_effect_is_shown_where_it_is_known_and_else_the_change():
    names = ("model.layers.0.q_proj.weight", "model.layers.1.q_proj.weight")
    known = survival_of(*names, kept=0.7, effect_norm=4.0, effect_error=1.0)

    effect = kept_chart(points_of_survival(known, {}), "map").map
    change = kept_chart(points_of_survival(survival_of(*names, kept=0.7), {}), "map").map

    assert (effect.quantity, [cell.value for cell in effect.cells]) == ("Effect kept", [0.75, 0.75])
    assert (change.quantity, [cell.value for cell in change.cells]) == ("Change kept", [0.7, 0.7])
    assert effect.text(0.75) == "75.0 %"


def test_an_effect_that_noise_drowns_is_not_below_zero():
    survival = survival_of("model.layers.0.q_proj.weight_packed", effect_norm=1.0, effect_error=9.0)

    (cell,) = kept_chart(points_of_survival(survival, {}), "map").map.cells

    assert cell.value == 0.0
    assert cell.label.startswith("model.layers.0.q_proj:")


def test_a_map_of_very_many_kinds_of_modules_is_cut_and_says_so():
    names = [f"model.layers.{n % 7}.kind_{n}.weight" for n in range(5000)]

    chart = size_chart(points_of_survival(survival_of(*names), {}), "map")

    assert len(chart.map.rows) * len(chart.map.columns) <= 4000
    assert f"The first {len(chart.map.rows)} of 5000 rows are shown." in chart.caption


def test_data_in_a_page_end_no_script_and_are_json():
    data = {"a": "</script><!--<script>", "b": [math.nan, math.inf, 0.1], "c": "\u2028\u202e\ud800\x7f"}

    text = embedded(data)

    assert not set("<>&") & set(text)
    text.encode("utf-8")
    assert json.loads(text)["a"] == data["a"]
    assert json.loads(text)["b"] == ["nan", "inf", 0.1]
    assert json.loads(text)["c"] == data["c"]


def test_data_that_are_too_large_leave_out_tensors_first():
    tensors = {f"tensor-{n}": {"kept": 1.0} for n in range(100_000)}
    issues = [{"sentence": "x" * 100}] * 20_000

    first = json.loads(embedded({"ok": True, "survival": tensors, "issues": issues[:10]}))
    second = json.loads(embedded({"ok": True, "survival": tensors, "issues": issues}))

    assert first["left_out"] == {"survival": 100_000}
    assert len(first["issues"]) == 10
    assert second["left_out"] == {"survival": 100_000, "issues": 20_000}
    assert second["ok"] is True


def test_the_largest_batch_fits_on_a_page(tmp_path):
    states = ["done"] * 9_000 + ["failed"] * 1_000
    issue = error("x", "model.layers.0", "is wrong " * 20, "mend it")
    jobs = tuple(
        JobReport(f"merged/{n}", "merge", f"merged/{n}", state, issues=(issue,) * (state == "failed"))
        for n, state in enumerate(states)
    )

    path = tmp_path / "page.html"
    write_report(BatchReport("batch.yaml", jobs, 1.0), path)

    assert path.stat().st_size < 2_000_000
    assert data_of(path)["left_out"]
    assert "merged/9999" in path.read_text()
    assert "no room for 8000 other jobs" in path.read_text()


def test_a_verification_with_very_many_errors_fits_on_a_page():
    found = Finding("recorded", "all", tuple(error("x", f"t{n}.{n}a", f"is {n}") for n in range(20_000)))

    page = report_html(Proof("out", "", (), (found,)))

    assert len(page.encode()) < 2 * MOST_BYTES
    assert "Verification failed: 20000 errors." in page


def test_an_error_has_a_page_with_every_issue_and_hint():
    page = report_html(
        PlanError([error("a", "<b>bold</b>", "is wrong", "mend it"), error("c", "", "no base")])
    )

    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page
    assert "mend it" in page
    assert "Merge failed: 2 errors." in page


def test_a_command_has_what_was_chosen_and_no_secret():
    values = {
        "base": "my base",
        "adapter": ("a:0.5", "b"),
        "out": "o",
        "token": "secret",
        "verify": "full",
        "workers": None,
        "combine": "linear",
        "overwrite": True,
    }

    text = command_text("merge", values)

    assert text.startswith("lora-merge merge ")
    assert set(text.split(" --")[1:]) == {
        "base 'my base'",
        "adapter a:0.5",
        "adapter b",
        "out o",
        "verify full",
        "overwrite",
    }


def test_a_link_leads_to_the_page_and_stays(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "page.html").symlink_to(tmp_path / "real" / "page.html")

    write_report(PlanError([error("a", "", "first")]), tmp_path / "page.html")
    write_report(PlanError([error("a", "", "second")]), tmp_path / "page.html")

    assert (tmp_path / "page.html").is_symlink()
    assert "second" in (tmp_path / "real" / "page.html").read_text()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["page.html"]


def test_a_link_into_an_output_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "out")

    with pytest.raises(RequestError, match="inside the output"):
        checked_place(str(tmp_path / "way" / "page.html"), (str(tmp_path / "out"),))
