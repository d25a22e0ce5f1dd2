"""Rounding that keeps the adapter, by compiled code (`lora_merge.native`): for CPUs, and for lattices that are floats or integers.

It follows `lora_merge.rounding.adapter` block by block, and sums in another order than torch's products of matrices do. So a value
that is as near to one level as to another may become the other one, and what follows in its line with it: 2 in a million
values in the tests. Each line is rounded alone, so its levels do not depend on the tile.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_merge.codecs.compiled import coded_of, stride_of
from lora_merge.codecs.lattice import E4M3, PLAIN, Floats, Integers
from lora_merge.native.library import STRIP, Job, Lattice, Sweep, library
from lora_merge.native.library import Product as Call
from lora_merge.rounding.bands import REACH

if TYPE_CHECKING:
    import torch

    from lora_merge.codecs.grid import Codes, Grid
    from lora_merge.codecs.lattice import Lattice as AnyLattice
    from lora_merge.rounding.schedule import Schedule

_INTEGERS, _FLOATS, _BFLOAT16 = range(3)


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
    return _rounded(source, grid, schedule, target, is_fed_back=True)


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
    codes = grid.codes
    if codes is None or not codes.out.is_cpu:
        return None
    if not is_fed_back and grid.quotient is not None:
        return None
    source = _shown(values)
    if source is None:
        return None
    assert len(codes.out) == len(values), "a tile's codes are stored as a whole"
    return _stored(source, grid, codes, schedule, is_fed_back=is_fed_back)


def merge_codes(
    grid: Grid,
    schedule: Schedule,
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    *,
    is_fed_back: bool = True,
) -> torch.Tensor | None:
    """Round what the stored codes of a whole tile stand for, with ``factor · left @ right`` added, and store the new codes. A few lines
    are computed at a time: no tile of values is in memory. Return the error, or None: then nothing is stored.

    Args:
        grid: of the tile, on its stored scales.
        schedule: of the adapter's row space.
        left: float32 ``[lines, r]``.
        right: float32 ``[r, in]``.
        factor: of their product.
        is_fed_back: as in `round_to_codes`.
    """
    codes = grid.codes
    if codes is None or codes.stored is None or codes.levels is None or grid.scale is None:
        return None
    if grid.bias is not None or not isinstance(grid.group, int):
        return None
    if not left.is_cpu or left.stride(1) != 1 or right.stride(1) != 1:
        return None
    n_lines, n_columns = len(left), right.shape[1]
    scale, zero = _side_by_side(grid.scale), None if grid.zero is None else _side_by_side(grid.zero)
    coded = coded_of(
        codes.stored,
        codes.levels,
        scale,
        (n_lines, n_columns),
        group=grid.group,
        zero=zero,
        is_e4m3=grid.lattice == E4M3,
    )
    if coded is None:
        return None
    assert codes.out.shape == codes.stored.shape, "a tile's codes are stored as a whole"
    added = Call(
        n_rows=n_lines,
        n_columns=n_columns,
        left=left.data_ptr(),
        left_stride=left.stride(0),
        right=right.data_ptr(),
        right_stride=right.stride(0),
        rank=len(right),
        scale=factor,
    )
    source = {
        "n_lines": n_lines,
        "n_columns": n_columns,
        "coded": ctypes.addressof(coded),
        "product": ctypes.addressof(added),
    }
    return _stored(source, grid, codes, schedule, is_fed_back=is_fed_back)


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


def _stored(
    source: dict[str, Any], grid: Grid, codes: Codes, schedule: Schedule, *, is_fed_back: bool
) -> torch.Tensor | None:
    """Round what a source has, and store the codes."""
    error = _rounded(source, grid, schedule, _places(codes), is_fed_back=is_fed_back)
    used = -(-source["n_columns"] * codes.bits // 8)
    if error is not None and used < codes.out.shape[1]:
        # What is left of the last word is 0, as `lora_merge.codecs.bits.pack` has it; the buffer is that of earlier tiles.
        codes.out[:, used:].zero_()
    return error


def _places(codes: Codes) -> dict[str, Any]:
    stored = codes.stored if codes.keeps_signs else None
    return {
        "codes": codes.out.data_ptr(),
        "code_stride": codes.out.stride(0),
        "bits": codes.bits,
        "offset": codes.offset,
        "stored": None if stored is None else stored.data_ptr(),
    }


def _rounded(
    source: dict[str, Any], grid: Grid, schedule: Schedule, target: dict[str, Any], *, is_fed_back: bool
) -> torch.Tensor | None:
    found = library()
    lattice = _lattice(grid.lattice)
    if found is None or lattice is None:
        return None
    n_lines, n_columns = source["n_lines"], source["n_columns"]
    flat = schedule.flat
    pulls = flat.pulls if is_fed_back else None
    assert is_fed_back == (pulls is not None), "a schedule without feedback is for the nearest levels"
    group = _group(n_columns, grid.group) if isinstance(grid.group, int) else grid.group.int().contiguous()
    error = schedule.basis.new_empty(n_lines, len(schedule.basis))
    sweeps = (Sweep * len(flat.sweeps))(
        *(Sweep(s.sizes.data_ptr(), s.pulls.data_ptr(), s.shares.data_ptr()) for s in flat.sweeps)
    )
    parts = {
        name: _side_by_side(part)
        for name, part in (("scale", grid.scale), ("zero", grid.zero), ("bias", grid.bias))
        if part is not None
    }
    found.round(
        Job(
            group=group.data_ptr(),
            lattice=lattice,
            rank=len(schedule.basis),
            sizes=flat.sizes.data_ptr(),
            pulls=None if pulls is None else pulls.data_ptr(),
            pushes=flat.pushes.data_ptr(),
            again=flat.again if is_fed_back else n_columns,
            n_sweeps=len(sweeps) if is_fed_back else 0,
            sweeps=ctypes.addressof(sweeps),
            error=error.data_ptr(),
            **{name: part.data_ptr() for name, part in parts.items()},
            **{f"{name}_stride": stride_of(part) for name, part in parts.items()},
            **source,
            **target,
        )
    )
    return error


def _side_by_side(part: torch.Tensor) -> torch.Tensor:
    """Return a part of a grid, float32, with the groups of a line beside each other."""
    import torch

    part = part.to(torch.float32)
    return part if part.stride(1) == 1 or part.shape[1] == 1 else part.contiguous()


@lru_cache
def _group(n_columns: int, size: int) -> torch.Tensor:
    """Return the group of each column, int32."""
    import torch

    return torch.arange(n_columns, dtype=torch.int32).div_(size or n_columns, rounding_mode="floor")


def _lattice(lattice: AnyLattice) -> Lattice | None:
    """Return what the compiled code has to know of a lattice; None where it does not know it."""
    if type(lattice) is Integers:
        return Lattice(kind=_INTEGERS, first=lattice.first, last=lattice.last, reach=REACH)
    if type(lattice) is not Floats and lattice != PLAIN["BF16"]:
        return None
    assert isinstance(lattice, Floats)
    mantissa, (first, last) = lattice.mantissa_bits, lattice.ends
    found = Lattice(
        kind=_FLOATS,
        first=first,
        last=last,
        reach=REACH * 2.0 ** -(1 + mantissa),
        smallest=2.0**lattice.smallest,
        largest=lattice.largest,
    )
    if lattice == PLAIN["BF16"]:
        found.kind = _BFLOAT16
        return found
    found.big = 1.5 * 2.0 ** (23 - mantissa)
    found.shift, found.below = 23 - mantissa, (126 + lattice.smallest) << mantissa
    found.spacings = 2.0 ** (mantissa - lattice.smallest)
    return found


assert STRIP == 64, "blocks of a schedule are in chunks of this many columns"
