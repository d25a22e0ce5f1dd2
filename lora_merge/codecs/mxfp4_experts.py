"""The experts of gpt-oss: MXFP4, stored the other way round than the parameter that transformers has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.geometry import lines_of
from lora_merge.codecs.tables import as_floats, look_up_e2m1
from lora_merge.core.weight import WEIGHT, PartRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from lora_merge.codecs.geometry import Lines
    from lora_merge.core.weight import Storage, Tile

_SCALE = "scale"

_GROUP = 32

_PIECE = 1 << 19
"""Values that are turned round at once."""


class Mxfp4Experts:
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
        codes, scale = parts[WEIGHT], parts[_SCALE]
        for expert, start, end in _pieces(lines):
            part = expert - lines.matrices[0]
            found = _decoded(
                codes[part, :, start // 2 : end // 2], scale[part, :, start // _GROUP : end // _GROUP]
            )
            begin = expert * lines.rows - lines.start
            values[begin + start : begin + end].copy_(found.t())


def _pieces(lines: Lines) -> Iterator[tuple[int, int, int]]:
    """Yield ``(expert, first row, end row)``: the rows of each expert, few enough at once to stay in the cache."""
    step = _GROUP * max(1, _PIECE // (_GROUP * lines.width))
    for expert in range(*lines.matrices):
        begin = expert * lines.rows
        end = min(lines.end - begin, lines.rows)
        for start in range(max(lines.start - begin, 0), end, step):
            yield expert, start, min(start + step, end)


def _decoded(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return float32 ``[out, n]`` of codes ``[out, n/2]`` and scales ``[out, n/32]``."""
    import torch

    n_out, n_groups = scale.shape
    out = torch.empty(n_out, n_groups, _GROUP, dtype=torch.float32, device=codes.device)
    look_up_e2m1(codes, out)
    return out.mul_(as_floats(scale, "F8_E8M0")[:, :, None]).view(n_out, -1)
