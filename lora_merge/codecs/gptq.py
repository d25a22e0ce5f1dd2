"""GPTQ: integers of 2, 3, 4 or 8 bits in 32-bit words, packed along ``in`` and stored transposed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.bits import (
    WORD_BITS,
    along_lines,
    codes_at_word_edges,
    pack,
    unpack,
    whole_codes,
    words_of,
)
from lora_merge.codecs.geometry import lines_of, whole
from lora_merge.codecs.grouped import dequantise_by_index, grouping
from lora_merge.codecs.lattice import Integers
from lora_merge.codecs.stored_grid import Coded, stored_grid
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import PartRange, Storage, Tile


class Gptq(Coded):
    """``(code - zero) · scale``, transposed (GPTQModel 7.7, ``dequantize_weight`` of its torch kernel).

    Parts, of a weight ``[out, in]``:
        weight: I32 ``[in · bits / 32, out]``, packed along the first axis.
        zero: I32 ``[groups, out · bits / 32]``, packed along the second. Version 1 stores each zero less 1.
        scale: floats ``[groups, out]``.
        g_idx: I32 ``[in]``, the group of each column of the weight.
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return the rows at which a word of zeros begins."""
        del shape, n_rows
        return codes_at_word_edges(int(dict(storage.settings)["bits"])), 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return all of each part: the rows of a tile are columns of them."""
        settings = dict(storage.settings)
        bits, groups = int(settings["bits"]), int(settings["groups"])
        n_out, n_in = tile.shape
        return {
            WEIGHT: whole("I32", (words_of(n_in, bits), n_out)),
            "zero": whole("I32", (groups, words_of(n_out, bits))),
            "scale": whole(str(settings["scale"]), (groups, n_out)),
            "g_idx": whole("I32", (n_in,)),
        }

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Unpack the columns of a tile, and apply the zero and the scale of each group."""
        settings = dict(storage.settings)
        bits, first, last = int(settings["bits"]), tile.start, tile.end
        out.copy_(unpack(along_lines(parts[WEIGHT], first, last), bits, out.shape[1]))
        scale, zero = _grid(parts, storage, first, last)
        dequantise_by_index(out, zero, scale, parts["g_idx"])

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales and zeros. The tile's columns of words are written into all of the part."""
        lines, bits = lines_of(tile), int(dict(storage.settings)["bits"])
        columns = slice(tile.start, tile.end)
        scale, zero = _grid(stored, storage, tile.start, tile.end)

        def unpack_stored() -> torch.Tensor:
            return unpack(along_lines(stored[WEIGHT], tile.start, tile.end), bits, lines.width).float()

        return stored_grid(
            Integers(0, (1 << bits) - 1),
            lambda levels: out[WEIGHT][:, columns].copy_(pack(whole_codes(levels), bits).T),
            unpack_stored,
            scale,
            zero=zero,
            group=grouping(stored["g_idx"]),
        )


def _grid(
    parts: Mapping[str, torch.Tensor], storage: Storage, first: int, last: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and zeros of some columns, float32 ``[lines, groups]``."""
    settings = dict(storage.settings)
    bits = int(settings["bits"])
    words = parts["zero"][:, first * bits // WORD_BITS : words_of(last, bits)]
    zero = _zeros(words, bits, last - first, is_less_one=settings["version"] == 1)
    return along_lines(parts["scale"], first, last).float(), zero


def _zeros(words: torch.Tensor, bits: int, n: int, *, is_less_one: bool) -> torch.Tensor:
    """Return the zeros of a tile: float32 ``[n, groups]``."""
    if is_less_one and WORD_BITS % bits == 0:
        # The writer subtracts 1 from all fields of a word at once, so that a zero of 0 borrows from the next field. Adding
        # the same number gives all fields back.
        words, is_less_one = words + sum(1 << at for at in range(0, WORD_BITS, bits)), False
    zeros = unpack(words, bits, n)
    if is_less_one:
        zeros = (zeros + 1) & ((1 << bits) - 1)
    return zeros.T.float()
