"""Every byte that a scheme makes is what llm-compressor and transformers make of the same weights."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from lora_merge.codecs import ENCODERS
from lora_merge.codecs.fresh_fp4 import look
from lora_merge.codecs.geometry import whole
from lora_merge.codecs.in_memory import decoded
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.view import View
from lora_merge.core.weight import Tile
from lora_merge.planning.mates import fused_with
from lora_merge.planning.quantising import parts_of
from lora_merge.quantised.schemes import SCHEMES
from tests.storages.asking import ask
from tests.storages.digesting import digest
from tests.storages.quantising import FITTING, RECORDED, digest_of, weights_of

each = pytest.mark.parametrize(("name", "kind"), FITTING, ids=str)


@cache
def recorded():
    """Return what the libraries made."""
    return json.loads(RECORDED.read_text())


def cut(part, one):
    """Return the view of a stored tensor that is the share of a tile."""
    ((first, nbytes),) = one.ranges
    whole = part.view(-1).view(torch.uint8)
    return whole[first : first + nbytes].view(getattr(torch, STORED_TYPES[one.dtype])).view(one.shape)


def ranges_of(tile, scheme):
    """Return the share of every part of a tile: those that a decoder reads, and the shape that it does not."""
    found = dict(ENCODERS[scheme.storage.codec].ranges(tile, scheme.storage))
    if "weight_shape" in scheme.suffixes:
        found["weight_shape"] = whole("I64", (len(tile.shape),))
    return found


def made(scheme, weights, elements):
    """Return the tensors of some weights, by name, each made in tiles of about so many elements."""
    mates = fused_with([f"{module}.weight" for module in weights])
    found = {}
    for module, weight in weights.items():
        survey = None
        if ENCODERS[scheme.storage.codec].survey(scheme.storage) == "tensor":
            for name in (f"{module}.weight", *mates[f"{module}.weight"]):
                survey = look(weights[name.removesuffix(".weight")].float(), survey)
        parts = quantised(scheme, weight.float(), elements, survey)
        names = {role: name for role, (name, _, _) in parts_of(scheme, module, tuple(weight.shape)).items()}
        found |= {names[role]: tensor for role, tensor in parts.items()}
    return found


def quantised(scheme, weight, elements=1 << 30, survey=None):
    """Return the parts of a weight in float32, by role."""
    shape = tuple(weight.shape)
    # What is not written would be seen.
    parts = {
        role: torch.full(size, 77, dtype=torch.int64).to(getattr(torch, STORED_TYPES[dtype]))
        for role, (_, dtype, size) in parts_of(scheme, "m", shape).items()
    }
    for start, end in View.of(shape).tiles(
        elements, ENCODERS[scheme.storage.codec].fresh_alignment(shape, scheme.storage)
    ):
        tile = Tile(shape, shape[0], start, end)
        ranges = ranges_of(tile, scheme)
        assert ranges.keys() == parts.keys()
        out = {role: cut(parts[role], one) for role, one in ranges.items()}
        values = weight[start:end].clone()
        grid = ENCODERS[scheme.storage.codec].grid(tile, values, out, scheme.storage, survey, None)
        levels = grid.nearest(values)
        assert torch.equal(values.view(torch.int32), weight[start:end].view(torch.int32))
        grid.keep(levels)
    return parts


@each
@pytest.mark.parametrize("elements", [1, 12345, 1 << 30], ids=["small", "middle", "whole"])
def test_all_bytes_are_the_librarys(name, kind, elements):
    tensors = made(SCHEMES[name], weights_of(kind), elements)
    expected = recorded()["outputs"][f"{name} {kind}"]["tensors"]
    assert {key: digest_of(tensor) for key, tensor in tensors.items()} == expected


@each
def test_what_is_decoded_again_is_what_the_library_decodes(name, kind):
    scheme, weights = SCHEMES[name], weights_of(kind)
    tensors = made(scheme, weights, 1 << 30)
    expected = recorded()["outputs"][f"{name} {kind}"]["values"]
    assert expected.keys() == {f"{module}.weight" for module in weights}
    for module, weight in weights.items():
        shape = tuple(weight.shape)
        parts = {role: tensors[key] for role, (key, _, _) in parts_of(scheme, module, shape).items()}
        assert digest(decoded(shape, scheme.storage, parts))[:20] == expected[f"{module}.weight"], module


@each
def test_the_grid_says_what_is_decoded(name, kind):
    """Its scales and zeros are those of the decoder, for whatever rounds onto it by another rule."""
    scheme = SCHEMES[name]
    for weight in weights_of(kind).values():
        shape, values = tuple(weight.shape), weight.float()
        tile = Tile(shape, shape[0], 0, shape[0])
        survey = look(values, None)
        parts = {
            role: torch.empty(size, dtype=getattr(torch, STORED_TYPES[dtype]))
            for role, (_, dtype, size) in parts_of(scheme, "m", shape).items()
        }
        out = {role: cut(parts[role], one) for role, one in ranges_of(tile, scheme).items()}
        grid = ENCODERS[scheme.storage.codec].grid(tile, values, out, scheme.storage, survey, None)
        levels = grid.nearest(values)
        expected = grid.values(levels)
        grid.keep(levels.clone())
        assert torch.equal(decoded(shape, scheme.storage, parts), expected)
        assert (grid.scale > 0).all()
        first, last = grid.lattice.ends
        assert ((levels >= first) & (levels <= last)).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_values_between_those_of_bfloat16_are_rounded_first(name):
    scheme, weight = SCHEMES[name], weights_of("even")["model.layers.0.mlp.up_proj"].float()
    finer = weight * (1 + 2.0**-11)
    assert torch.equal(finer.to(torch.bfloat16).float(), weight)
    assert not torch.equal(finer, weight)
    survey = look(weight, None)
    assert torch.equal(look(finer, None), survey)
    one, other = (quantised(scheme, values, survey=survey) for values in (weight, finer))
    assert {role: digest_of(part) for role, part in one.items()} == {
        role: digest_of(part) for role, part in other.items()
    }


def test_a_block_of_tiny_values_becomes_zeros():
    """transformers divides 448 by the largest of them, which overflows: its codes are NaN where a value is zero."""
    weight = torch.full((128, 128), 2.0**-125)
    weight[0] = 0.0
    scheme = SCHEMES["fp8"]
    parts = quantised(scheme, weight)
    assert torch.equal(parts["scale"], torch.ones(1, 1))
    assert torch.equal(decoded((128, 128), scheme.storage, parts), torch.zeros(128, 128))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_the_largest_values_have_no_exponent_that_is_nan(name):
    weight = torch.full((8, 32), 3.3e38)
    parts = quantised(SCHEMES[name], weight)
    assert torch.equal(parts["scale"], torch.full((8, 1), 253 if name == "mxfp4" else 247, dtype=torch.uint8))


def test_a_global_scale_fills_the_range_of_the_scales():
    weight = weights_of("even")["model.layers.0.mlp.up_proj"].float()
    scheme = SCHEMES["nvfp4"]
    parts = quantised(scheme, weight, survey=look(weight, None))
    # 448 but for the roundings to bfloat16.
    assert 400.0 <= float(parts["scale"].float().max()) <= 448.0
    apart = decoded(tuple(weight.shape), scheme.storage, parts) - weight
    assert 0.05 < float(apart.norm() / weight.norm()) < 0.12


def test_a_global_scale_needs_all_values():
    with pytest.raises(AssertionError, match="look at them first"):
        quantised(SCHEMES["nvfp4"], torch.ones(16, 16))


@pytest.fixture(scope="session")
def asked(oracles_python):
    """Return what the libraries make now."""
    return ask(oracles_python, "tests.storages.making.quantisers", ())


@each
def test_the_library_still_makes_the_same(name, kind, asked):
    key = f"{name} {kind}"
    assert asked["outputs"][key] == recorded()["outputs"][key]


def test_the_digests_are_of_the_releases_that_are_installed(asked):
    assert asked["made_by"] == recorded()["made_by"]
