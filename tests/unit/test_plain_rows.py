"""Rows that are recomputed without torch: the same verdicts as those of the formulas, value by value."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lora_merge.checks import expecting
from lora_merge.checks.bounds import Wanted
from lora_merge.checks.expecting import Weights, expect, is_plain_sum
from lora_merge.checks.formulas import Site, changed
from lora_merge.checks.plain_rows import PlainRows, rounded
from lora_merge.checks.reading import Reader
from lora_merge.checks.rounding import PRECISION
from lora_merge.checks.rounding import rounded as rounded_by_torch
from lora_merge.checks.weighing import Pattern, weights_of
from lora_merge.core.adapter import Delta
from lora_merge.core.plan import Combination, Rounding
from lora_merge.core.tensor import Region, Survival
from lora_merge.core.view import View
from lora_merge.core.weight import Weight
from lora_merge.deltas import LowRankFacts
from lora_merge.formats.safetensors import read_header
from tests.steps import dense_merge

ROWS, COLUMNS, RANK = 24, 130, 5
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def drawn(shape, generator, dtype="F32", size=1.0):
    """Return values of all sizes, zeros among them."""
    values = torch.randn(shape, generator=generator) * size
    values *= 2.0 ** torch.randint(-12, 3, shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.1] = 0
    return values.to(TORCH[dtype])


def ref_of(path, name):
    return next(ref for ref in read_header(path).tensors if ref.name == name)


@pytest.fixture
def merge(tmp_path):
    """Return a function that writes base, adapter and output, and returns the merge, and the weight as it is written."""

    def made(dtype="BF16", factors="F32", scale=0.37, size=1.0, seed=0, rank=RANK, spoil=lambda stored: None):
        generator = torch.Generator().manual_seed(seed)
        base = drawn((ROWS, COLUMNS), generator, dtype, size)
        a, b = drawn((rank, COLUMNS), generator, factors), drawn((ROWS, rank), generator, factors, size)
        stored = (base.float() + (b.float() @ a.float()) * scale).to(TORCH[dtype])
        spoil(stored)
        for name, tensors in (("base", {"w": base}), ("adapter", {"a": a, "b": b}), ("out", {"w": stored})):
            save_file(tensors, tmp_path / f"{name}.safetensors")
        pair = {
            "A": ref_of(tmp_path / "adapter.safetensors", "a"),
            "B": ref_of(tmp_path / "adapter.safetensors", "b"),
        }
        delta = Delta("w", LowRankFacts(), pair, scale=scale).placed("w")
        source = ref_of(tmp_path / "base.safetensors", "w")
        op = dense_merge(source, (delta,), View.of(source.shape))
        return op, Weight.dense(ref_of(tmp_path / "out.safetensors", "w"))

    return made


def verdicts(op, written):
    """Return for each row what is said without torch, and by the formulas."""
    assert PlainRows.applies(op)
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)
        rows = PlainRows(reader, op, written)
        plain = [rows.are_explained([row]) for row in range(ROWS)]
        site = Site(reader, op, range(ROWS), op.between_dtype)
        exact, off = changed(site, op.deltas, site.start(range(ROWS)))
        stored = reader.written(written, range(ROWS), ROWS)
        explained = Wanted(op, stored, exact, off).is_explained(torch.ones(1, 1, dtype=torch.bool))
        assert rows.are_explained(range(ROWS)) == bool(explained.all())
    return plain, explained.all(1).tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-38, 1e20])
@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("factors", ["F32", "BF16"])
def test_verdicts_are_those_of_the_formulas(merge, dtype, factors, size, seed):
    generator = np.random.default_rng(seed)

    def spoil(stored):
        # Some rows are right. In the others one value is a few steps off, or in the wrong place.
        width = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}[dtype]
        bits = stored.view(width)
        for row in range(0, ROWS, 2):
            bits[row, generator.integers(COLUMNS)] += int(generator.choice([-300, -2, -1, 1, 2, 300]))

    plain, wanted = verdicts(*merge(dtype, factors, size=size, seed=seed, spoil=spoil))
    assert plain == wanted
    if size == 1.0:
        assert all(wanted[1::2])
        assert not all(wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_explained(merge, value):
    def spoil(stored):
        stored[3, 7] = value

    plain, wanted = verdicts(*merge(spoil=spoil))
    assert plain == wanted
    assert plain.index(False) == 3


@pytest.mark.parametrize("dtype", PRECISION)
def test_rounding_is_that_of_torch_arithmetic(dtype):
    values = torch.randn(1 << 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values *= 2.0 ** torch.randint(-160, 120, values.shape, generator=torch.Generator().manual_seed(1))
    values[::7] = values[::7].bfloat16().double()  # some are numbers already
    values[::11] = 0
    assert rounded(values.numpy(), dtype).tolist() == rounded_by_torch(values, dtype).tolist()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("by", [0, 1, 3, 4, 5, 6, 40])
def test_values_that_were_moved_for_the_adapter_are_those_of_the_formulas(merge, dtype, by):
    generator = np.random.default_rng(by)

    def spoil(stored):
        # Of each row one value is some steps away.
        bits = stored.view(torch.int16)
        for row in range(ROWS):
            bits[row, generator.integers(COLUMNS)] += int(generator.choice([-by, by]))

    op, written = merge(dtype, "F32", rank=2, spoil=spoil)
    op = replace(op, rounding=Rounding("adapter"))
    permissive = Survival(1.0, 1.0, 0.0, 0.0, effect_norm=1e30, effect_error=1e30)
    plain, wanted, kept = [], [], []
    for row in range(ROWS):
        with contextlib.ExitStack() as stack:
            reader = Reader(stack)
            rows = PlainRows(reader, op, written)
            plain.append(rows.are_explained([row]))
            kept.append(rows.are_as_recorded(permissive))
            assert not rows.are_as_recorded(None)
            site = Site(reader, op, [row], op.between_dtype)
            exact, off = changed(site, op.deltas, site.start([row]))
            found = Wanted(op, reader.written(written, [row], ROWS), exact, off)
            wanted.append(bool(found.is_explained(torch.ones(1, 1, dtype=torch.bool)).all()))
    assert plain == wanted
    assert any(kept) or by > 5
    if by < 4:
        assert all(plain)
    if by == 40:
        assert not any(plain)


def test_other_merges_are_left_to_the_formulas(merge):
    op, _ = merge()
    (delta,) = op.deltas
    others = [
        replace(op, deltas=(delta, delta)),
        replace(op, deltas=(replace(delta, adapter_weight=0.5),)),
        replace(op, deltas=(replace(delta, rounded=True),)),
        replace(op, deltas=(replace(delta, region=Region(transposed=True)),)),
        replace(op, deltas=(replace(delta, part=((0, 2), (0, COLUMNS))),)),
        replace(op, rounding=Rounding("stochastic")),
        replace(op, combination=Combination("ties", 0.5, 0, 0, "")),
    ]
    assert PlainRows.applies(op)
    assert not any(map(PlainRows.applies, others))


@pytest.mark.parametrize("factors", TORCH)
@pytest.mark.parametrize("n", range(4))
def test_what_projections_must_be_is_that_of_the_formulas(merge, monkeypatch, factors, n):
    op, _ = merge(factors=factors, seed=n)
    op = replace(op, deltas=(*op.deltas, replace(op.deltas[0], adapter_weight=0.5)))
    pattern = Pattern.of(f"w{n}", COLUMNS, "BF16", "BF16")
    weights = Weights(pattern, weights_of("w", pattern.taken))
    assert is_plain_sum(op)
    found = expect(op, weights)
    monkeypatch.setattr(expecting, "is_plain_sum", lambda op: False)
    wanted = expect(op, weights)
    assert wanted.change.any()
    np.testing.assert_allclose(found.change, wanted.change, rtol=1e-4, atol=1e-5)
    assert found.taken is wanted.taken is None
    assert not found.spread.any()
    assert np.isnan(found.lengths).all()
