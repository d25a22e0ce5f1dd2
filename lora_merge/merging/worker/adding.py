"""A plain product that is added to bfloat16 rows in one pass, by compiled code.

It sums in the order of the rank, with fused multiply-adds, on every processor. So does torch with MKL's code for AVX-512 (tried out with
torch 2.13.0, ranks 2 to 128). Other code may have another last bit of a sum in float32: MKL's for AVX2 in some shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.native.library import library
from lora_merge.rounding.lines import product_of

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lora_merge.core.plan import Merge
    from lora_merge.deltas.algebra import Product
    from lora_merge.merging.worker.sample import Sample

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Halves = np.ndarray[Any, Any]
    """bfloat16, as integers of 16 bits."""

_RANKS = range(2, 129)
"""Of a single direction torch adds in other steps. With more of them it sums in several blocks."""


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
    import torch

    if library() is None or not may_add(len(product.right)) or not (raw.is_cpu and product.left.is_cpu):
        return False
    if any(part.stride(1) != 1 for part in (product.left, product.right)):
        return False
    assert raw.is_contiguous()
    assert out.is_contiguous()
    base, written = (part.view(torch.int16).numpy() for part in (raw, out))
    return add_rows(base, written, product.left.numpy(), product.right.numpy(), product.scale)


def add_rows(base: Halves, out: Halves, left: Numbers, right: Numbers, scale: float) -> bool:
    """Write rows with a product added, as `add` does, without torch. The rows of each array are in one piece.

    Args:
        base: bfloat16, ``[rows, columns]``; out: the same.
        left: of the product, ``[rows, rank]``; right: ``[rank, columns]``.
        scale: of the product.
    """
    found = library()
    if found is None:
        return False
    call = product_of(left, right, scale)
    call.base, call.out = base.ctypes.data, out.ctypes.data
    return found.add(call)


def compare_added(sample: Sample, raw: torch.Tensor, out: torch.Tensor, product: Product) -> None:
    """Compare the first rows of a tile that `add` has written; see there, and `compare`."""
    import torch

    n = sample.n_compared(*raw.shape)
    base, written = (part[:n].view(torch.int16).numpy() for part in (raw, out))
    compare(sample, base, written, product.left[:n].numpy(), product.right.numpy(), product.scale)


def compare(sample: Sample, base: Halves, out: Halves, left: Numbers, right: Numbers, scale: float) -> None:
    """Compare the wanted change of some rows with the change that is written.

    Args:
        sample: gets what is found.
        base: bfloat16 as it was read, ``[rows, columns]``; out: as it is written.
        left: of the product, ``[rows, rank]``; right: ``[rank, columns]``.
        scale: of the product.
    """
    import numpy as np

    before, stored = _values(base), _values(out)
    with np.errstate(all="ignore"):
        # Not by a matrix library, whose sums depend on the machine.
        change = np.einsum("ik,kj->ij", left, right)
        wanted = before + change * np.float32(scale)
    sample.see(before, wanted, stored)


def _values(halves: Halves) -> Numbers:
    """Return bfloat16 values, of integers of 16 bits, as float32."""
    import numpy as np

    return (halves.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
