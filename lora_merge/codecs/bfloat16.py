"""Arithmetic of libraries that quantise models in bfloat16: the largest sizes, and quotients that are rounded once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import in_groups

if TYPE_CHECKING:
    import torch

_SIZE = 0x7FFF
"""Of a bfloat16 as an int16: all bits but the sign. Their order is that of the sizes, and it is found faster among integers."""


def sizes_of(values: torch.Tensor) -> torch.Tensor:
    """Return the sizes of float32 values once they are rounded to bfloat16: int16, its bits without the sign; same shape."""
    import torch

    return values.to(torch.bfloat16).view(torch.int16).bitwise_and_(_SIZE)


def largest(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Return the largest size in each block, of values that are rounded to bfloat16.

    Args:
        values: float32 ``[lines, in]``.
        rows: of a block; the last one may be cut off. 1 for a block in each line.
        columns: of a block, likewise; 0 for the whole line.

    Returns:
        Bfloat16 ``[⌈lines / rows⌉, ⌈in / columns⌉]``.
    """
    import torch

    sizes = sizes_of(values)
    if rows != 1:
        sizes = _of_runs(sizes, rows, 0)
    return _of_runs(sizes, columns or values.shape[1], 1).view(torch.bfloat16)


def largest_of_all(values: torch.Tensor) -> torch.Tensor:
    """Return the largest size of all values, rounded to bfloat16: float32 ``[1]``."""
    import torch

    return sizes_of(values).amax().view(torch.bfloat16).float().reshape(1)


def divided(size: torch.Tensor, by: float) -> torch.Tensor:
    """Return sizes divided by a number, rounded once to their dtype."""
    import torch

    # A device multiplies by the inverse of a plain number, which rounds otherwise.
    return size / torch.tensor(by, dtype=size.dtype, device=size.device)


def _of_runs(sizes: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """Return the largest of each run of ``size`` along an axis; the last run may be shorter."""
    import torch

    n = sizes.shape[axis]
    full = n // size
    found = []
    if full:
        found.append(torch.unflatten(sizes.narrow(axis, 0, full * size), axis, (full, size)).amax(axis + 1))
    if full * size < n:
        found.append(sizes.narrow(axis, full * size, n - full * size).amax(axis, keepdim=True))
    return found[0] if len(found) == 1 else torch.cat(found, axis)


def quotient(
    values: torch.Tensor, scale: torch.Tensor, group: int, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Return ``value / scale + zero``, where each step is rounded to bfloat16: float32 ``[lines, in]``, new memory.

    Args:
        values: float32 ``[lines, in]``; they are rounded to bfloat16 first.
        scale: bfloat16 ``[lines, groups]``.
        group: adjacent values of a group; 0 for the whole line.
        zero: bfloat16 ``[lines, groups]``; None for 0.
    """
    import torch

    found = values.to(torch.bfloat16)
    for part, columns in in_groups(found, group):
        part.div_(scale[:, columns, None])
        if zero is not None:
            part.add_(zero[:, columns, None])
    # A sum has no negative zero, and the library adds a zero in every scheme.
    return found.float().add_(0.0) if zero is None else found.float()
