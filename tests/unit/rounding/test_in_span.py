"""What a rounding keeps of an adapter's effect."""

from __future__ import annotations

import torch

from lora_merge.rounding.basis import row_space
from lora_merge.rounding.effect import NOTHING, in_span


def case():
    generator = torch.Generator().manual_seed(0)
    base, a, b = (torch.randn(shape, generator=generator) for shape in ((96, 64), (4, 64), (96, 4)))
    return base, b @ a, row_space([a])


def test_the_base_itself_keeps_nothing_and_the_exact_merge_all():
    base, delta, basis = case()
    none, everything = (in_span(stored, base + delta, base, basis) for stored in (base, base + delta))
    assert abs(none.relative_error - 1) < 1e-12
    assert abs(none.share_kept) < 1e-12
    assert everything.relative_error == 0
    assert everything.share_kept == 1
    # All of Δ lies in the span, so nothing of its size is missed.
    assert abs(none.wanted / delta.double().square().sum().item() - 1) < 1e-5


def test_an_error_outside_the_span_does_not_count():
    base, delta, basis = case()
    noise = torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    outside = noise - noise @ basis.T @ basis
    assert in_span(base + delta + outside, base + delta, base, basis).relative_error < 1e-6
    inside = in_span(base + delta + 0.5 * delta, base + delta, base, basis)
    assert abs(inside.relative_error - 0.5) < 1e-6
    assert abs(inside.share_kept - 1.5) < 1e-6


def test_tiles_add_up():
    base, delta, basis = case()
    stored, values = base + delta.bfloat16().float(), base + delta
    whole = in_span(stored, values, base, basis)
    parts = NOTHING
    for start in (0, 40):
        rows = slice(start, start + 40 if not start else 96)
        parts += in_span(stored[rows], values[rows], base[rows], basis)
    assert abs(parts.error / whole.error - 1) < 1e-12
    assert abs(parts.wanted / whole.wanted - 1) < 1e-12


def test_along_the_lines_is_the_same_of_the_transposed():
    base, delta, basis = case()
    stored, values = base + delta.bfloat16().float(), base + delta
    across = in_span(stored, values, base, basis)
    along = in_span(stored.t(), values.t(), base.t(), basis, along=True)
    assert across == along


def test_an_adapter_that_changes_nothing_has_nothing_to_lose():
    base, _, basis = case()
    found = in_span(base, base, base, basis)
    assert (found.relative_error, found.share_kept) == (0.0, 1.0)
