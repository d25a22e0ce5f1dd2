"""What every member of `METHODS` keeps, the toys among them."""

from __future__ import annotations

import random
import time

import pytest

from lora_merge.codecs import CODECS
from lora_merge.core.tensor import TensorRef, nbytes_of
from lora_merge.core.weight import WEIGHT
from lora_merge.quantised import METHODS, Surroundings, identify
from tests.quantised_headers import EVERY, of
from tests.toys.codecs import TOYS, known

DENSE = of({}, {".weight": ("BF16", (256, 384)), ".bias": ("BF16", (256,))}, "", {})

MOST_SECONDS = 3.0
"""Of the processor, for the 45 000 modules that a large mixture of experts has."""


def around(headers):
    return Surroundings(headers.config, headers.read, headers.side, headers.metadata)


def tensors(headers):
    return {ref.name: ref for ref in headers.refs()}


@pytest.fixture(params=[*METHODS, *TOYS])
def method(request):
    with known(*TOYS):
        yield METHODS[request.param]


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_parts_are_tensors_of_one_weight_each(method, headers):
    found = method.identify(tensors(headers), around(headers))

    parts = [ref for weight in found.weights.values() for ref in weight.parts.values()]
    assert len({ref.name for ref in parts}) == len(parts)
    assert {ref.name for ref in parts} <= set(headers.tensors)
    assert not {ref.name for ref in parts} & {ref.name for ref in found.others}
    for name, weight in found.weights.items():
        assert weight.name == name
        assert weight.storage.dtype == weight.parts[WEIGHT].dtype
        assert list(weight.storage.settings) == sorted(weight.storage.settings)


def test_a_dense_checkpoint_is_of_no_method(method):
    found = method.identify(tensors(DENSE), around(DENSE))
    assert (dict(found.weights), found.others, found.issues) == ({}, (), ())


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_nothing_that_is_given_is_changed(method, headers):
    given, surroundings = tensors(headers), around(headers)
    before = (list(given.items()), repr(surroundings.config), repr(surroundings.side))
    method.identify(given, surroundings)
    assert (list(given.items()), repr(surroundings.config), repr(surroundings.side)) == before


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_the_order_of_tensors_does_not_matter(method, headers):
    refs = headers.refs()
    first = method.identify({ref.name: ref for ref in refs}, around(headers))
    random.Random(7).shuffle(refs)
    second = method.identify({ref.name: ref for ref in refs}, around(headers))
    assert dict(second.weights) == dict(first.weights)
    assert {str(issue) for issue in second.issues} == {str(issue) for issue in first.issues}


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_only_small_tensors_are_read(headers):
    read = []

    def reading(ref):
        read.append(ref)
        return headers.read(ref)

    weights = identify(
        headers.refs(), Surroundings(headers.config, reading, headers.side, headers.metadata)
    ).weights
    codes = {weight.parts[WEIGHT].name for weight in weights.values()}
    assert not codes & {ref.name for ref in read}


@pytest.mark.parametrize("headers", EVERY.values(), ids=EVERY)
def test_each_storage_has_a_codec(headers):
    codecs = {weight.storage.codec for weight in headers.found().weights.values()}
    assert codecs <= CODECS.keys()


@pytest.mark.parametrize(
    "key", ["fp8 blocks", "ct INT4", "ct NVFP4", "gptq", "modelopt NVFP4", "mlx, 4 bits"]
)
def test_a_large_mixture_of_experts_is_identified_in_seconds(key):
    small = EVERY[key]
    suffixes = {
        name.removeprefix("model.layers.0.mlp.down_proj"): entry
        for name, entry in small.tensors.items()
        if ".layers.0." in name
    }
    refs = [
        TensorRef(f"model.layers.{layer}.mlp.experts.{expert}.{name}{suffix}", dtype, shape, "f", 0, nbytes_of(dtype, shape))
        for layer in range(60)
        for expert in range(250)
        for name in ("gate_proj", "up_proj", "down_proj")
        for suffix, (dtype, shape) in suffixes.items()
    ]  # fmt: skip

    began = time.process_time()
    found = identify(refs, around(small))

    assert time.process_time() - began < MOST_SECONDS
    assert len(found.weights) == 45_000
    assert found.issues == ()
