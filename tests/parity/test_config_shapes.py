"""Adapters whose configs look as real ones do: merged as PEFT computes them, or refused for the right reason."""

from __future__ import annotations

import re

import pytest

import lora_merge
from tests.crossing import one_for_each
from tests.parity import shape_building
from tests.parity.config_shapes import SHAPES, Shape
from tests.parity.method_shapes import METHOD_SHAPES

TOLERANCE = 5e-5
"""Five times what test_kinds.py derives: T5 does not scale its scores, so what they are off by grows."""

LEAST_EFFECT = 0.02
"""Of an adapter on what is computed: a wrong merge is off by about as much."""

ALL_SHAPES = (*SHAPES, *METHOD_SHAPES)


def cases(*, refused: bool):
    """Return the shapes to merge, or those to refuse, each with a name of its own."""
    return [
        pytest.param(
            shape,
            id=f"{number}-{re.sub(r'[^A-Za-z0-9.]+', '_', f'{shape.where}-{shape.base}')}",
        )
        for number, shape in enumerate(ALL_SHAPES)
        if bool(shape.refused) == refused
    ]


def off_by(got, wanted):
    """Return the largest difference as a part of the largest value."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    "shape",
    one_for_each(
        cases(refused=False),
        lambda shape: shape.base,
        lambda shape: shape.trained,
        lambda shape: shape.config.get("peft_type"),
        lambda shape: (tuple(sorted(shape.options)), tuple(sorted(shape.built_with))),
    ),
)
def test_an_adapter_with_the_config_is_merged_into_what_peft_computes(shape: Shape, workshop, tmp_path):
    plain, wanted = shape_building.trained(workshop, tmp_path / "adapter", shape)
    assert off_by(plain, wanted) > LEAST_EFFECT
    base = shape_building.base(workshop, shape.base)
    lora_merge.merge(base=base, adapter=tmp_path / "adapter", out=tmp_path / "out", **shape.options)
    merged = shape_building.load(
        tmp_path / "out", shape.trained or shape_building.by_name(shape.base).architecture
    )
    assert off_by(shape_building.compute(merged, shape.base), wanted) < TOLERANCE


@pytest.mark.parametrize("shape", cases(refused=True))
def test_an_adapter_with_the_config_is_refused_for_its_reason(shape: Shape, workshop, tmp_path):
    shape_building.trained(workshop, tmp_path / "adapter", shape)
    base = shape_building.base(workshop, shape.base)
    with pytest.raises(lora_merge.PlanError) as caught:
        lora_merge.merge(base=base, adapter=tmp_path / "adapter", out=tmp_path / "out", **shape.options)
    assert shape.refused in {issue.code for issue in caught.value.issues}, caught.value
    assert shape.says in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_every_shape_stands_there_once():
    seen = [repr((dict(shape.config), shape.base, shape.trained)) for shape in ALL_SHAPES]
    assert len(set(seen)) == len(seen)
