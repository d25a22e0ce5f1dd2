"""Integer codes with a zero and a scale for each group of a line: value = (code - zero) · scale, in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import in_groups

if TYPE_CHECKING:
    import torch


def dequantise(codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, group: int) -> None:
    """Turn codes into values, in place.

    Args:
        codes: float32 ``[lines, in]``.
        zero: float32 ``[lines, groups]``.
        scale: float32 ``[lines, groups]``.
        group: adjacent values of a group; 0 for the whole line.
    """
    for values, columns in in_groups(codes, group):
        values.sub_(zero[:, columns, None]).mul_(scale[:, columns, None])


def dequantise_by_index(
    codes: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, g_idx: torch.Tensor
) -> None:
    """Turn codes into values, in place. The values of a group may be anywhere in a line, as act-order leaves them.

    Args:
        codes: float32 ``[lines, in]``.
        zero: float32 ``[lines, groups]``.
        scale: float32 ``[lines, groups]``.
        g_idx: int32 ``[in]``: the group of each column.
    """
    group = grouping(g_idx)
    if isinstance(group, int):
        dequantise(codes, zero, scale, group)
    else:
        codes.sub_(zero.index_select(1, g_idx)).mul_(scale.index_select(1, g_idx))


def grouping(g_idx: torch.Tensor) -> int | torch.Tensor:
    """Return the size of the groups where they follow each other, else the index itself: `lora_merge.codecs.grid.Grid.group`."""
    return _size_in_order(g_idx) or g_idx


def _size_in_order(g_idx: torch.Tensor) -> int:
    """Return the size of groups that follow each other; 0 where they do not."""
    import torch

    size = int((g_idx == 0).sum())
    if not size:
        return 0
    in_order = torch.arange(len(g_idx), dtype=g_idx.dtype, device=g_idx.device)
    return size if torch.equal(in_order.div_(size, rounding_mode="floor"), g_idx) else 0
