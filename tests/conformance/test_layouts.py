"""What every layout keeps, for each member of `LAYOUTS`: it names a stored tensor, or says that it cannot."""

from __future__ import annotations

import pytest

from lora_merge.core.tensor import TensorRef
from lora_merge.layouts import LAYOUTS, locate

NAMES = ("model.layers.0.q_proj.weight", "model.layers.0.q_proj.bias", "model.layers.10.q_proj.weight")
TENSORS = {name: TensorRef(name, "BF16", (4, 4), "file", 32 * n, 32) for n, name in enumerate(NAMES)}

FOUND = {"identity": {name: name for name in NAMES}}
"""For each layout, parameters and the names of the stored tensors that hold them."""


def test_every_layout_has_something_to_find():
    assert FOUND.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_finds_its_parameters(name):
    assert FOUND[name]
    for parameter, stored in FOUND[name].items():
        assert LAYOUTS[name](parameter, TENSORS) == stored
        assert locate(parameter, TENSORS) == stored


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "parameter", ["", "q_proj.weight", "model.layers.0.q_proj", "model.layers.1.q_proj.weight", "q_proj"]
)
def test_a_parameter_that_is_nowhere_is_not_guessed(name, parameter):
    assert LAYOUTS[name](parameter, TENSORS) is None
    assert locate(parameter, TENSORS) is None
