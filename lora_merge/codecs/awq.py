"""AWQ: integers of 4 bits in 32-bit words, packed along ``out`` in an interleaved order and stored transposed (``gemm``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bits import along_lines, whole_codes
from lora_merge.codecs.geometry import groups_of, lines_of, whole
from lora_merge.codecs.grouped import dequantise
from lora_merge.codecs.lattice import Integers
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Tile

_PER_WORD = 8

_SHIFTS = tuple(4 * field for field in (0, 4, 1, 5, 2, 6, 3, 7))
"""Where each of the eight codes of a word begins, in bits."""


class Awq(Coded):
    """``(code - zero) · scale``, transposed (AutoAWQ, ``dequantize_gemm``). Zeros are stored as they are.

    Parts, of a weight ``[out, in]``:
        weight: I32 ``[in, out / 8]``.
        zero: I32 ``[in / group, out / 8]``.
        scale: floats ``[in / group, out]``.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return the eight rows that share a word."""
        del shape, n_rows, storage
        return _PER_WORD, 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return all of each part: the rows of a tile are columns of them."""
        settings = dict(storage.settings)
        n_out, n_in = tile.shape
        groups, words = groups_of(n_in, int(settings["group"])), -(-n_out // _PER_WORD)
        return {
            WEIGHT: whole("I32", (n_in, words)),
            "zero": whole("I32", (groups, words)),
            "scale": whole(str(settings["scale"]), (groups, n_out)),
        }

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Unpack the columns of a tile, and apply the zero and the scale of each group."""
        settings, first, last = dict(storage.settings), tile.start, tile.end
        scale, zero = _grid(parts, first, last)
        _unpack(parts[WEIGHT], first, out)
        dequantise(out, zero, scale, int(settings["group"]))

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales and zeros. The tile's columns of words are written into all of the part."""
        lines, first = lines_of(tile), tile.start
        scale, zero = _grid(stored, first, tile.end)

        def unpack() -> torch.Tensor:
            levels = scale.new_empty(lines.n, lines.width)
            _unpack(stored[WEIGHT], first, levels)
            return levels

        return stored_grid(
            Integers(0, 15),
            lambda levels: _pack(levels, first, out[WEIGHT]),
            unpack,
            scale,
            zero=zero,
            group=int(dict(storage.settings)["group"]),
        )


def _grid(parts: Mapping[str, torch.Tensor], first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zeros of some columns, float32 ``[lines, groups]``."""
    scale = along_lines(parts["scale"], first, last).float()
    zero = scale.new_empty(scale.shape)
    _unpack(parts["zero"], first, zero)
    return scale, zero


def _unpack(words: torch.Tensor, first: int, out: torch.Tensor) -> None:
    """Unpack some columns into the rows of ``out``, beginning with the column ``first``, a multiple of 8."""
    last = first + out.shape[0]
    lines = along_lines(words, first // _PER_WORD, -(-last // _PER_WORD))
    for k, shift in enumerate(_SHIFTS):
        rows = out[k::_PER_WORD]
        # The last word may have fewer than eight rows.
        rows.copy_((lines[: rows.shape[0]] >> shift).bitwise_and_(15))


def _pack(levels: torch.Tensor, first: int, words: torch.Tensor) -> None:
    """Pack rows into some columns of words, the inverse of `_unpack`. Fields beyond the last row are 0."""
    import torch

    codes = whole_codes(levels)
    codes = (
        torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % _PER_WORD)).view(torch.int8).to(torch.int32)
    )
    lines = torch.zeros_like(codes[::_PER_WORD])
    for k, shift in enumerate(_SHIFTS):
        lines |= codes[k::_PER_WORD] << shift
    at = first // _PER_WORD
    words[:, at : at + len(lines)].copy_(lines.T)
