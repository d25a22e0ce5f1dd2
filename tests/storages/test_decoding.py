"""What is decoded has the bits that the libraries decode, by the digests that they left or by asking them."""

from __future__ import annotations

import pytest

from lora_merge.formats.weights import WeightReader, values_of
from tests.storages.asking import ask
from tests.storages.digesting import digest
from tests.storages.reference import FIXTURES, NAMES, ONE_OF_EACH, quantised_of, said

each = pytest.mark.parametrize("name", NAMES)


@each
def test_every_quantised_weight_has_the_bits_of_its_library(name):
    import torch

    about, weights = said(name), quantised_of(FIXTURES / name)
    expected = about["weights"]
    assert weights.keys() == expected.keys()
    for path, weight in weights.items():
        values = values_of(weight)
        assert list(values.shape) == expected[path]["shape"]
        assert digest(values) == expected[path]["float32"], path
        # A library that rounds in between (the scale, the product before the sum) is matched in float32 alone.
        if expected[path]["rounds once"]:
            own = getattr(torch, about["dtype"])
            assert digest(values.to(own)) == expected[path][about["dtype"]], path


@each
def test_tiles_together_are_the_weight(name):
    import torch

    for path, weight in quantised_of(FIXTURES / name).items():
        n_rows = weight.shape[0]
        whole = values_of(weight).reshape(n_rows, -1)
        for step in (5, 32):
            with WeightReader(weight, n_rows, is_watched=True) as reader:
                parts = [
                    reader.values(start, min(start + step, n_rows)).clone()
                    for start in range(0, n_rows, step)
                ]
            assert torch.equal(torch.cat(parts), whole), (path, step)


@pytest.fixture(scope="session")
def asked(oracles_python):
    """Return what the libraries say now, by fixture: one process for all."""
    return ask(oracles_python, "tests.storages.making.oracles", (FIXTURES / name for name in NAMES))


@each
def test_the_library_still_decodes_the_same(name, asked):
    assert asked[name]["weights"] == said(name)["weights"]


def test_the_digests_are_of_the_releases_that_are_installed(asked):
    assert {name: asked[name]["oracle"] for name in NAMES} == {name: said(name)["oracle"] for name in NAMES}


def test_the_fixtures_are_small():
    sizes = [path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file()]
    assert sum(sizes) < 7 << 20
    assert max(sizes) < 1 << 20


def test_the_fixtures_cover_the_shapes_that_are_often_decoded_wrongly():
    """Grids that do not divide the shape, and nested scales of which the last block is not full."""
    shapes = {tuple(about["shape"]) for about in said("fp8-ragged")["weights"].values()}
    assert (576, 448) in shapes
    assert (192, 256) in {tuple(about["shape"]) for about in said("fp8-ragged-evenly")["weights"].values()}
    nested = {
        weight.parts["absmax"].shape[0] % 256 for weight in quantised_of(FIXTURES / "bnb-nf4-double").values()
    }
    assert nested == {0, 128}


def test_the_sample_has_every_codec_of_every_method():
    def codecs(names):
        return {
            (name.partition("-")[0], weight.storage.codec)
            for name in names
            for weight in quantised_of(FIXTURES / name).values()
        }

    assert codecs(ONE_OF_EACH) == codecs(NAMES)
