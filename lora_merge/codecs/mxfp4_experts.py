"""The experts of gpt-oss: MXFP4, stored the other way round than the parameter that transformers has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bfloat16 import divided
from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.grid import Grid
from lora_merge.codecs.lattice import E2M1, E2M1_AWAY
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.codecs.tables import E2M1_SIGNS, as_floats, keep_signs_of_zeros_, look_up_e2m1, pack_e2m1_
from lora_merge.core.weight import WEIGHT, PartRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from lora_merge.codecs.geometry import Lines
    from lora_merge.core.weight import Storage, Tile

_SCALE = "scale"

_GROUP = 32

_MANTISSA_BITS = 23
_EXPONENT = 0x7F800000
_UP = (1 << _MANTISSA_BITS) - 1
"""Added to the bits of a float32, it raises the exponent where any bit of the mantissa is set."""

_PIECE = 1 << 19
"""Values that are turned round at once."""


class Mxfp4Experts(Coded):
    """``weight`` (``…_blocks``) U8 ``[E, out, in/32, 16]`` and ``scale`` (``…_scales``) U8 ``[E, out, in/32]``, for a parameter
    ``[E, in, out]``: W[e, j, i] = e2m1 · 2^(s - 127), as transformers 5.23 has it (``convert_moe_packed_tensors``).
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return 32 rows where a row is one of ``in``: the group that has one scale."""
        del storage
        return (1 if n_rows == shape[0] else _GROUP), 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return all codes ``[experts, out, in/2]`` and scales ``[experts, out, in/32]`` of the experts that the tile has
        rows of: its rows lie across them.
        """
        del storage
        lines = lines_of(tile)
        first, last = lines.matrices

        def of_experts(columns: int) -> PartRange:
            size = lines.width * columns
            return PartRange(
                "U8", (last - first, lines.width, columns), ((first * size, (last - first) * size),)
            )

        return {WEIGHT: of_experts(lines.rows // 2), _SCALE: of_experts(lines.rows // _GROUP)}

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Multiply each code by its power of two, expert by expert, and turn the result round."""
        del storage
        lines = lines_of(tile)
        values = out.view(lines.n, lines.width)
        for piece, codes, scale in _pieces(lines, parts):
            values[piece].copy_(_decoded(codes, as_floats(scale, "F8_E8M0")).t())

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales. The tile's share of each stored row is written into all of it."""
        del storage
        import torch

        lines = lines_of(tile)
        scale = torch.empty(lines.n, lines.width, device=stored[_SCALE].device)
        for piece, _, found in _pieces(lines, stored):
            scale[piece].view(-1, _GROUP, lines.width).copy_(as_floats(found, "F8_E8M0").t()[:, None])

        def unpack() -> torch.Tensor:
            levels = torch.empty_like(scale)
            for piece, codes, found in _pieces(lines, stored):
                levels[piece].copy_(_decoded(codes, torch.ones_like(found, dtype=torch.float32)).t())
            return levels

        def pack(levels: torch.Tensor) -> None:
            # The scales are only there because `_pieces` cuts both parts.
            written = {WEIGHT: out[WEIGHT], _SCALE: stored[_SCALE]}
            _pack(lines, levels, written)
            pieces = zip(_pieces(lines, written), _pieces(lines, stored), strict=True)
            for (_, codes, _), (_, before, _) in pieces:
                keep_signs_of_zeros_(codes, before, E2M1_SIGNS)

        # Groups are across lines, so each value of a line has a scale.
        return stored_grid(E2M1, pack, unpack, scale, group=1)

    def fresh(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
    ) -> Grid:
        """Make scales of the values, by the rule of triton_kernels."""
        del storage, survey
        lines = lines_of(tile)
        return _fresh(lines, values.view(lines.n, lines.width), out, values.new_empty(lines.n, lines.width))

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return the blocks of 32 codes ``[E, out, in/32, 16]``, and their scales ``[E, out, in/32]``."""
        del storage
        *stack, width, rows = shape
        blocks = (*stack, rows, width // _GROUP)
        return {WEIGHT: ("U8", (*blocks, _GROUP // 2)), _SCALE: ("U8", blocks)}


def _fresh(lines: Lines, values: torch.Tensor, out: Mapping[str, torch.Tensor], scale: torch.Tensor) -> Grid:
    """Write new scales for a tile, and return its grid: each scale is the smallest power of two that brings the largest
    value of the group to 6 at most, and ties go away from zero.

    Args:
        lines: of the tile, whole groups of them.
        values: float32 ``[lines, out]``; they are rounded to bfloat16 first.
        out: the parts to fill.
        scale: float32 ``[lines, out]``, to be filled.

    Reference:
        triton_kernels ``downcast_to_mxfp_torch`` with ``ROUND_UP``: how gpt-oss was published. The exponent is that of the
        float32 quotient by 6, one more where its mantissa is not 0.
    """
    import torch

    for piece, _, found in _pieces(lines, out):
        groups = values[piece].to(torch.bfloat16).view(-1, _GROUP, lines.width)
        wanted = divided(groups.abs().amax(1).float(), 6.0).view(torch.int32)
        found.copy_(wanted.add_(_UP).bitwise_and_(_EXPONENT).bitwise_right_shift_(_MANTISSA_BITS).t())
        scale[piece].view(-1, _GROUP, lines.width).copy_(as_floats(found, "F8_E8M0").t()[:, None])
    return Grid(
        E2M1_AWAY,
        lambda levels: _pack(lines, levels, out),
        scale=scale,
        group=1,
        quotient=lambda found: found.to(torch.bfloat16).float().div_(scale),
    )


def _pack(lines: Lines, levels: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> None:
    """Write the codes of levels ``[lines, out]`` into their places."""
    for piece, codes, _ in _pieces(lines, parts):
        pack_e2m1_(levels[piece].t().contiguous(), codes)


def _pieces(
    lines: Lines, parts: Mapping[str, torch.Tensor]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield some lines of the tile, views of their codes ``[out, n/2]``, and of their scales ``[out, n/32]``: lines of one
    expert, few enough at once to stay in the cache.
    """
    step = _GROUP * max(1, _PIECE // (_GROUP * lines.width))
    for expert in range(*lines.matrices):
        begin = expert * lines.rows
        end = min(lines.end - begin, lines.rows)
        for start in range(max(lines.start - begin, 0), end, step):
            stop = min(start + step, end)
            yield (
                slice(begin - lines.start + start, begin - lines.start + stop),
                parts[WEIGHT][expert - lines.matrices[0], :, start // 2 : stop // 2],
                parts[_SCALE][expert - lines.matrices[0], :, start // _GROUP : stop // _GROUP],
            )


def _decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 ``[out, n]`` of codes ``[out, n/2]`` and float32 scales ``[out, n/32]``."""
    import torch

    n_out, n_groups = scale.shape
    out = torch.empty(n_out, n_groups, _GROUP, dtype=torch.float32, device=codes.device)
    look_up_e2m1(codes, out)
    return out.mul_(scale[:, :, None]).view(n_out, -1)
