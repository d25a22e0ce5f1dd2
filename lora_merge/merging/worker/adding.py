"""A plain product that is added to bfloat16 rows in one pass, by compiled code, with the bits of torch."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from lora_merge.native.library import Library, library
from lora_merge.native.library import Product as Call

if TYPE_CHECKING:
    import torch

    from lora_merge.core.plan import Merge
    from lora_merge.deltas.algebra import Product

_RANKS = range(2, 49)
"""Of a single direction torch adds in other steps. With more of them the matrix library is as quick."""


def can_add(op: Merge) -> bool:
    """Return whether a merge has the dtypes and the shape for which there is compiled code."""
    return (
        library() is not None
        and op.combination is None
        and len(op.deltas) == 1
        and op.deltas[0].adapter_weight == 1
        and op.source.storage.is_dense
        and op.target.is_dense
        and op.source.dtype == op.target.dtype == "BF16"
    )


def may_add(rank: int) -> bool:
    """Return whether compiled code is to add products of a rank."""
    return rank in _RANKS


def add(raw: torch.Tensor, out: torch.Tensor, product: Product) -> bool:
    """Write rows with a product added, each value rounded to float32 and then to bfloat16, as torch does.

    Return False where that is not done: nothing may be used of what is written then.

    Args:
        raw: bfloat16 ``[rows, columns]``.
        out: the same.
        product: for these rows.
    """
    found, rank = library(), product.right.shape[0]
    if found is None or not may_add(rank) or not (raw.is_cpu and product.left.is_cpu):
        return False
    if any(part.stride(1) != 1 for part in (product.left, product.right)) or not is_as_torch(
        rank, product.scale
    ):
        return False
    return _call(found, raw, out, product.left, product.right, product.scale)


def _call(
    found: Library,
    raw: torch.Tensor,
    out: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
) -> bool:
    assert raw.is_contiguous()
    assert out.is_contiguous()
    n_columns = right.shape[1]
    return found.add(
        Call(
            n_rows=len(left),
            n_columns=n_columns,
            base=raw.data_ptr(),
            out=out.data_ptr(),
            left=left.data_ptr(),
            left_stride=left.stride(0),
            right=right.data_ptr(),
            right_stride=right.stride(0),
            rank=right.shape[0],
            scale=scale,
        )
    )


@lru_cache
def is_as_torch(rank: int, scale: float) -> bool:
    """Return whether torch's matrix library sums a product of this rank in order, as the compiled code does: tried out once."""
    import torch

    found = library()
    if found is None:
        return False
    generator = torch.Generator().manual_seed(rank)
    left, right = (torch.randn(shape, generator=generator) for shape in ((72, rank), (rank, 1024)))
    # Halves of a step of bfloat16 would show every other rounding of the sum: the base is as large as the product.
    base = torch.randn(72, 1024, generator=generator).to(torch.bfloat16)
    out = torch.empty_like(base)
    is_finite = _call(found, base, out, left, right, scale)
    values = base.float()
    values = values.addmm_(left, right) if scale == 1 else values.add_((left @ right).mul_(scale))
    return is_finite and torch.equal(out, values.to(torch.bfloat16))
