"""The row space of LoRA factors."""

from __future__ import annotations

import torch

from lora_merge.rounding.basis import row_space


def factor(rows, columns, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_basis_is_orthonormal_and_spans_the_rows():
    first, second = factor(8, 192), factor(4, 192, 1, torch.bfloat16)
    basis = row_space([first, second])
    assert basis.shape == (12, 192)
    assert basis.dtype == torch.float32
    assert (basis @ basis.T - torch.eye(12)).abs().max() < 1e-6
    for rows in (first, second.float()):
        assert (rows - rows @ basis.T @ basis).norm() < 1e-5 * rows.norm()


def test_rows_that_others_explain_are_dropped():
    first = factor(8, 192)
    assert len(row_space([first, first[:3] * 5, first[:2] + first[2:4], torch.zeros(2, 192)])) == 8


def test_a_small_adapter_beside_a_large_one_keeps_its_directions():
    assert len(row_space([factor(8, 192), factor(4, 192, 1) * 1e-9])) == 12


def test_more_rows_than_columns_have_the_whole_space():
    assert len(row_space([factor(24, 16)])) == 16


def test_zeros_have_no_directions():
    assert row_space([torch.zeros(4, 64)]) is None
    assert row_space([]) is None


def test_the_same_factors_have_the_same_basis():
    assert torch.equal(row_space([factor(8, 320)]), row_space([factor(8, 320)]))
