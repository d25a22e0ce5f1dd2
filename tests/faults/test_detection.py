"""Faults planted in a merge and in what it has staged: is each of them found before the output gets its name?"""

from __future__ import annotations

import pytest

import lora_merge
from lora_merge.checks import choosing
from lora_merge.core.plan import Merge
from lora_merge.errors import VerifyError
from tests import planting
from tests.tampering import edit_tensors


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def case(request, pico, pico_adapter):
    """A base and an adapter. Rows are wide enough for four products each; one product misses an error now and then."""
    base = pico("llama", request.param, "400KB", hidden_size=256, intermediate_size=320)
    return base, pico_adapter(base, target_modules="all-linear")


@pytest.fixture
def no_small_tensors(monkeypatch):
    """Have no tensor recomputed for being small, as in a large model."""
    monkeypatch.setattr(choosing, "WHOLE_ELEMENTS", 0)


def refused(case, out, level="sample"):
    """Return the subjects and sentences of the issues that a merge is refused for."""
    with pytest.raises(VerifyError) as caught:
        lora_merge.merge(base=case[0], adapter=case[1], out=out, verify=level)
    assert not out.exists()
    assert list(out.parent.glob(".*")) == []
    return [(issue.subject, issue.sentence) for issue in caught.value.verdict.errors]


@pytest.mark.parametrize("fault", planting.IN_MERGES)
def test_a_fault_in_rows_is_found_and_named(fault, case, no_small_tensors, tmp_path):
    plan = lora_merge.plan(base=case[0], adapter=case[1])
    for seed in range(8):
        place = planting.place_in(plan, seed)
        with planting.in_merge(fault, place, place.name):
            ((subject, sentence),) = refused(case, tmp_path / "out")
        assert subject == place.name
        if fault in planting.IN_ROWS:
            assert (
                f"row {min(place.row, place.other) if 'two rows' in fault else place.row}, column" in sentence
            )


@pytest.mark.parametrize("where", planting.ON_DISK)
def test_a_bit_that_flips_on_the_disk_is_found(where, case, tmp_path):
    for seed in range(4):
        with planting.bit_flipped(where, seed):
            assert refused(case, tmp_path / "out")


@pytest.mark.parametrize("level", ["sample", "full"])
def test_an_element_one_unit_off_is_found_where_its_row_is_recomputed(level, case, tmp_path):
    plan = lora_merge.plan(base=case[0], adapter=case[1])
    if plan.steps[0].main.dtype == "F32":
        pytest.skip("float32 arithmetic itself may be off by a unit")
    place = planting.place_in(plan, 1)
    with planting.one_unit_off(place, place.name):
        ((subject, sentence),) = refused(case, tmp_path / "out", level)
    assert subject == place.name
    assert f"row {place.row}, column {place.column} is" in sentence


def test_a_good_merge_is_said_to_be_checked_row_by_row(case, no_small_tensors, tmp_path):
    report = lora_merge.merge(base=case[0], adapter=case[1], out=tmp_path / "out")
    plan = lora_merge.plan(base=case[0], adapter=case[1])
    merges = [step.op for step in plan.steps if isinstance(step.op, Merge)]
    assert report.verdict.n_projected == sum(op.view.n_rows for op in merges)
    assert report.verdict.n_rows < report.verdict.n_projected
    assert report.verdict.issues == ()


def test_a_row_of_zeros_in_an_output_is_found_years_later(case, no_small_tensors, tmp_path):
    out = tmp_path / "out"
    lora_merge.merge(base=case[0], adapter=case[1], out=out)
    place = planting.place_in(lora_merge.plan(base=case[0], adapter=case[1]), 3)
    (out / "merge_manifest.json").unlink()
    for path in out.glob("*.safetensors"):
        edit_tensors(
            path, lambda tensors: [t[place.row].zero_() for n, t in tensors.items() if n == place.name]
        )

    proof = lora_merge.verify(out, base=case[0], adapter=case[1])

    assert {finding.check for finding in proof.findings if finding.state == "failed"} == {"recompute"}
    (issue,) = [issue for issue in proof.issues if issue.severity == "error"]
    assert (issue.subject, issue.sentence.partition(",")[0]) == (place.name, f"row {place.row}")


@pytest.mark.parametrize("level", ["sample", "full"])
def test_deltas_of_subnormal_size_pass(level, pico, pico_adapter, tampered, tmp_path):
    base = tampered(pico("llama", "float32"), "base")
    adapter = tampered(pico_adapter(pico("llama", "float32"), target_modules=["q_proj"]), "adapter")
    edit_tensors(
        base / "model.safetensors",
        lambda tensors: [t.mul_(1e-38) for name, t in tensors.items() if "q_proj" in name],
    )
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: [t.mul_(1e-19) for t in tensors.values()],
    )

    report = lora_merge.merge(base=base, adapter=adapter, out=tmp_path / "out", verify=level)

    assert report.verdict.ok
    assert all(kept.delta_norm > 0 or kept.unchanged < 1 for kept in report.survival.values())
