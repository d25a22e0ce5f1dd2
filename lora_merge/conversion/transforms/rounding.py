"""Casts factors to the dtype in which they are stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.tensor import TORCH_NAMES

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.transforms.pair import Pair


def rounded(pair: Pair, wanted: str | None, own: str) -> Pair:
    """Return factors in the dtype in which they are stored.

    Args:
        pair: in float32.
        wanted: dtype code that the user asks for; None: ``own``, where it holds every value exactly, else float32.
        own: dtype code that the adapter came in.
    """
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[wanted or own])
    a, b = pair.a.to(dtype), pair.b.to(dtype)
    # Without a wish of the user nothing may be lost, so float32 holds what the own dtype cannot.
    if wanted is None and not (_same(a, pair.a) and _same(b, pair.b)):
        return replace(pair, a=pair.a.float(), b=pair.b.float())
    return replace(pair, a=a, b=b)


def _same(rounded: torch.Tensor, values: torch.Tensor) -> bool:
    import torch

    return torch.equal(rounded.float(), values.float())
