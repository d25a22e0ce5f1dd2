"""Every kind of adapter in `KINDS`: the real command against PEFT's forward pass, and its merge's bits."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.crossing import one_for_each
from tests.parity import building
from tests.parity.kinds import KINDS, Kind

# The same derivation as in test_lora.py: no inner dimension is larger than 256, at most some ten products lie
# one after the other, and every one adds √n·2⁻²⁴ of its size. Where the merge forms a product of factors first
# (LoKr, RandLoRA, a decomposed base, …), that product has such an error too, and it is counted among the ten.
FLOAT32_TOLERANCE = 1e-5

# A wrong merge is off by about the adapter's effect. A few per cent are four orders of magnitude above that.
LEAST_EFFECT = 0.05


def cases(*dtypes, kinds=KINDS):
    """Return kind × model × dtype, for dtypes of the kind's own."""
    return [
        pytest.param(
            kind, model, dtype, id=f"{re.sub(r'[^A-Za-z0-9=]+', '_', kind.name).strip('_')}-{model}-{dtype}"
        )
        for kind in kinds
        for model in kind.models
        for dtype in kind.dtypes
        if dtype in dtypes
    ]


@pytest.fixture
def build(workshop, record_property):
    """Return a function (kind, model, dtype) → base and adapter, which also names the row of the table."""

    def make(kind: Kind, model: str, dtype: str) -> building.Case:
        record_property("kind", [kind.name, model, dtype])
        if kind.needs:
            pytest.importorskip(kind.needs)
        return building.case(workshop, kind, model, dtype)

    return make


@pytest.fixture
def merge_by_peft(stored, tmp_path):
    """Return a function (base and adapter) → the tensors of the checkpoint that PEFT's default merge gives."""

    def merge(case: building.Case):
        case.save_merged_by_peft(tmp_path / "by-peft")
        return stored(tmp_path / "by-peft")

    return merge


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    one_for_each(cases("float32"), lambda kind, *_: kind.name, lambda _, model, __: model),
)
def test_the_merged_checkpoint_computes_what_base_and_adapter_compute(
    kind, model, dtype, build, merged, record_property
):
    case = build(kind, model, dtype)
    wanted = building.compute(case.unmerged(), model)
    assert off_by(building.compute(case.plain(), model), wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter, *kind.options)
    error = off_by(building.compute(building.load_afresh(out, model), model), wanted)
    record_property("measured", f"{error:.1e}")
    assert error <= FLOAT32_TOLERANCE


def assert_same_bytes(got, wanted):
    """Every tensor has the name, dtype, shape and bytes that it should; which ones differ is the message."""
    assert sorted(got) == sorted(wanted)
    assert [name for name in wanted if got[name] != wanted[name]] == []


RIGHT = tuple(kind for kind in KINDS if kind.peft_merge_is_right)
WRONG = tuple(kind for kind in KINDS if not kind.peft_merge_is_right)
WHOLE = tuple(kind for kind in KINDS if kind.group == "whole parameters" and "LoRA" not in kind.name)


@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    one_for_each(
        cases("bfloat16", "float16", kinds=RIGHT),
        lambda kind, *_: kind.name,
        lambda _, model, dtype: (model, dtype),
    ),
)
def test_every_tensor_has_the_bits_of_pefts_merge(kind, model, dtype, build, merged, merge_by_peft, stored):
    case = build(kind, model, dtype)
    wanted = merge_by_peft(case)
    assert wanted != stored(case.base)
    assert_same_bytes(stored(merged(case.base, case.adapter, *kind.options)), wanted)


@pytest.mark.parametrize(("kind", "model", "dtype"), cases("bfloat16", kinds=WHOLE))
def test_a_parameter_that_was_trained_in_float32_is_rounded_once_to_the_dtype_of_the_base(
    kind, model, dtype, workshop, merged, merge_by_peft, stored
):
    case = building.case(workshop, kind, model, "float32")
    case = dataclasses.replace(case, base=building.base(workshop, model, dtype))
    wanted = merge_by_peft(case)
    assert_same_bytes(stored(merged(case.base, case.adapter, *kind.options)), wanted)


@pytest.mark.parametrize(("kind", "model", "dtype"), cases("float32", kinds=WRONG))
def test_where_pefts_merge_is_said_to_be_wrong_it_is(kind, model, dtype, workshop):
    case = building.case(workshop, kind, model, dtype)
    unmerged = case.unmerged()
    wanted = building.compute(unmerged, model)
    assert off_by(building.compute(unmerged.merge_and_unload(), model), wanted) > LEAST_EFFECT


def test_every_kind_has_its_own_name():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)


OFT_ON_3X3 = Kind(
    "OFT on a 3×3 convolution",
    "other PEFT methods",
    "OFT",
    "OFTConfig",
    {"oft_block_size": 8, "target_modules": ["layer.1.convolution"]},
    ("resnet",),
)
LOHA_ON_WEIGHT_NORM = Kind(
    "LoHa on a convolution under weight_norm",
    "other PEFT methods",
    "LOHA",
    "LoHaConfig",
    {"r": 4, "target_modules": ["pos_conv_embed.conv"]},
    ("wav2vec2",),
)


@pytest.mark.parametrize("kind", [OFT_ON_3X3, LOHA_ON_WEIGHT_NORM], ids=lambda kind: kind.peft_type)
def test_what_no_weight_of_the_same_shape_computes_is_refused(kind, workshop, cli, tmp_path):
    # OFT folds overlapping patches of its input; under weight_norm the checkpoint holds no weight to change.
    # PEFT merges both without a word, into something else.
    case = building.case(workshop, kind, kind.models[0], "float32")
    unmerged = case.unmerged()
    wanted = building.compute(unmerged, case.model)
    assert off_by(building.compute(unmerged.merge_and_unload(), case.model), wanted) > LEAST_EFFECT
    result = cli("--base", case.base, "--adapter", case.adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4
    assert not Path(tmp_path / "out").exists()
