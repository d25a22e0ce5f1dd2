"""Rounding that keeps the adapter, by compiled code (`lora_merge.native`): for CPUs, and for lattices that are floats or integers.

It follows `lora_merge.rounding.adapter` block by block, and sums in another order than torch's products of matrices do. So a value
that is as near to one level as to another may become the other one, and what follows in its line with it: 2 in a million
values in the tests. Each line is rounded alone, so its levels do not depend on the tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.codecs.lattice import PLAIN
from lora_merge.rounding import lines
from lora_merge.rounding.lines import Added, Place, Scales

if TYPE_CHECKING:
    import torch

    from lora_merge.codecs.grid import Codes, Grid
    from lora_merge.rounding.schedule import Schedule


def round_to_levels(
    values: torch.Tensor, grid: Grid, schedule: Schedule, out: torch.Tensor
) -> torch.Tensor | None:
    """Round as `lora_merge.rounding.adapter.round_adapter` does. Return the error, or None: then nothing is written.

    Args:
        values: float32 ``[lines, in]``.
        grid: of these lines.
        schedule: of the adapter's row space.
        out: for the levels, in the shape of the values: float32, or bfloat16 where levels are its numbers. It may be the values.
    """
    import torch

    if out.dtype == torch.float32:
        target: dict[str, Any] = {"levels": out.data_ptr(), "stride_out": out.stride(0)}
    elif out.dtype == torch.bfloat16 and grid.lattice == PLAIN["BF16"]:
        target = {"codes": out.data_ptr(), "code_stride": 2 * out.stride(0), "bits": 16}
    else:
        return None
    if out.stride(1) != 1 or not out.is_cpu:
        return None
    source = _shown(values)
    if source is None:
        return None
    error = lines.round_lines(source, _scales(grid), schedule.feedback, target, is_fed_back=True)
    return None if error is None else torch.from_numpy(error)


def round_to_codes(
    values: torch.Tensor, grid: Grid, schedule: Schedule, *, is_fed_back: bool = True
) -> torch.Tensor | None:
    """Round the values of a whole tile, and store their codes where `Grid.codes` says. Return the error, or None: then nothing is
    stored.

    Args:
        values: float32 ``[lines, in]``.
        grid: of the tile.
        schedule: of the adapter's row space.
        is_fed_back: False for the nearest levels, of which only the error is wanted. Then any schedule of the basis gives the same.
    """
    import torch

    codes = grid.codes
    if codes is None or not codes.out.is_cpu:
        return None
    if not is_fed_back and grid.quotient is not None:
        return None
    source = _shown(values)
    if source is None:
        return None
    assert len(codes.out) == len(values), "a tile's codes are stored as a whole"
    error = lines.store(source, _scales(grid), schedule.feedback, _place(codes), is_fed_back=is_fed_back)
    return None if error is None else torch.from_numpy(error)


def merge_codes(
    grid: Grid,
    schedule: Schedule,
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    *,
    is_fed_back: bool = True,
) -> torch.Tensor | None:
    """Round what the stored codes of a whole tile stand for, with ``factor · left @ right`` added, and store the new codes, see
    `lora_merge.rounding.lines.merge_codes`. Return the error, or None: then nothing is stored.

    Args:
        grid: of the tile, on its stored scales.
        schedule: of the adapter's row space.
        left: float32 ``[lines, r]``.
        right: float32 ``[r, in]``.
        factor: of their product.
        is_fed_back: as in `round_to_codes`.
    """
    import torch

    codes = grid.codes
    if codes is None or codes.stored is None or codes.levels is None or not left.is_cpu:
        return None
    error = lines.merge_codes(
        codes.stored.numpy(),
        codes.levels.numpy(),
        _scales(grid),
        Added(left.numpy(), right.numpy(), factor),
        schedule.feedback,
        _place(codes),
        is_fed_back=is_fed_back,
    )
    return None if error is None else torch.from_numpy(error)


def _shown(values: torch.Tensor) -> dict[str, Any] | None:
    """Return the fields of a job that say where its values are; None where there are none that compiled code can read."""
    if not values.is_cpu or not values.numel() or values.stride(1) != 1:
        return None
    n_lines, n_columns = values.shape
    return {
        "n_lines": n_lines,
        "n_columns": n_columns,
        "values": values.data_ptr(),
        "stride": values.stride(0),
    }


def _place(codes: Codes) -> Place:
    stored = None if codes.stored is None else codes.stored.numpy()
    return Place(codes.out.numpy(), codes.bits, codes.offset, stored, codes.keeps_signs)


def _scales(grid: Grid) -> Scales:
    """Return what compiled code has to know of a grid on the CPU."""
    group = grid.group if isinstance(grid.group, int) else grid.group.int().contiguous().numpy()
    scale, zero, bias = (
        None if part is None else _side_by_side(part).numpy() for part in (grid.scale, grid.zero, grid.bias)
    )
    return Scales(grid.lattice, group, scale, zero, bias)


def _side_by_side(part: torch.Tensor) -> torch.Tensor:
    """Return a part of a grid, float32, with the groups of a line beside each other."""
    import torch

    part = part.to(torch.float32)
    return part if part.stride(1) == 1 or part.shape[1] == 1 else part.contiguous()
