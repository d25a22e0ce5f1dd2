"""Projections by compiled code are those of torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_merge.checks.weighing import CompiledViews, Pattern, TileViews, views_of, weights_of
from lora_merge.native.library import hidden, library

pytestmark = pytest.mark.skipif(library() is None, reason="no compiled code here")

COLUMNS = (4, 6, 62, 64, 66, 128, 130, 256, 1000, 1024, 2048, 5632)


def tile(rows: int, columns: int, seed: int) -> memoryview:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    # Read as float32, a zero beside another value is subnormal.
    values[torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < 0.3] = 0
    return memoryview(bytearray(values.view(torch.uint8).numpy().tobytes()))


def taken(views: TileViews | CompiledViews, pattern: Pattern, rows: int, name: str):
    products, lengths = np.full((rows, pattern.groups), np.nan, np.float32), np.full(rows, np.nan, np.float32)
    views.project(weights_of(name, pattern.taken), products, lengths)
    return products, lengths


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_compiled_projections_are_those_of_torch(rows, columns):
    for n in range(8):  # names draw patterns
        name = f"layers.{n}.weight"
        pattern = Pattern.of(name, columns, "BF16", "BF16")
        assert pattern.halved
        content = tile(rows, columns, n)
        compiled = views_of(content, rows, "BF16", pattern, whole=False)
        assert isinstance(compiled, CompiledViews)
        with hidden():
            plain = views_of(content, rows, "BF16", pattern, whole=False)
        assert isinstance(plain, TileViews)

        products, lengths = taken(compiled, pattern, rows, name)
        wanted, norms = taken(plain, pattern, rows, name)

        # Sums of at most 64 values of about 1, in another order.
        np.testing.assert_allclose(products, wanted, rtol=0, atol=64 * 4 * 2.0**-24 * 8)
        np.testing.assert_allclose(lengths, norms, rtol=64 * 2.0**-24, atol=2.0**-126)


def test_numbers_that_are_not_finite_show():
    pattern = Pattern.of("x", 64, "BF16", "BF16")
    content = tile(3, 64, 0)
    at = 64 * 2 + 2 * (pattern.first + 1)
    content[at : at + 2] = b"\xc0\x7f"  # NaN
    products, _ = taken(views_of(content, 3, "BF16", pattern, whole=False), pattern, 3, "x")
    assert np.isnan(products[1]).any()
    assert np.isfinite(products[[0, 2]]).all()


def test_subnormal_numbers_count_again_afterwards():
    pattern = Pattern.of("x", 64, "BF16", "BF16")
    taken(views_of(tile(3, 64, 0), 3, "BF16", pattern, whole=False), pattern, 3, "x")
    assert float(torch.tensor(2.0**-140).mul(0.5)) > 0


def test_weights_are_the_same_in_every_process():
    found = weights_of("model.layers.0.self_attn.q_proj.weight", 4)
    assert found.tolist() == [
        -0.8607041835784912,
        -0.9157256484031677,
        0.8459773659706116,
        -0.9682728052139282,
    ]
