"""Integers of 1 to 8 bits in 32-bit words, packed along the lines, as compressed-tensors writes them (``pack-quantized``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs import fresh_packed
from lora_merge.codecs.bits import (
    WORD_BITS,
    along_lines,
    codes_at_word_edges,
    pack,
    unpack,
    whole_codes,
    words_of,
)
from lora_merge.codecs.compiled import decode, whole_numbers
from lora_merge.codecs.geometry import by_line, groups_of, lines_of, whole
from lora_merge.codecs.grid import Codes
from lora_merge.codecs.grouped import dequantise, dequantise_by_index, grouping
from lora_merge.codecs.lattice import Integers
from lora_merge.codecs.stored_grid import Coded, stored_at_once, stored_grid
from lora_merge.core.tensor import nbytes_of
from lora_merge.core.weight import WEIGHT, PartRange

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from lora_merge.codecs.geometry import Lines
    from lora_merge.codecs.grid import Grid
    from lora_merge.core.weight import Storage, Tile

_AT_ONCE = 1 << 19
"""Values that are unpacked or packed at once: those of a usual tile."""


class PackedInt(Coded):
    """``(code - zero) · scale`` (compressed-tensors 0.20, ``unpack_from_int32`` and ``dequantize``).

    Codes are stored as value + 2^(bits - 1), and so are zeros. A weight without zeros has 0 everywhere.

    Parts, of a weight ``[…, out, in]``:
        weight: I32 ``[…, out, ⌈in · bits / 32⌉]``.
        scale: floats ``[…, out, ⌈in / group⌉]``.
        zero: I32 ``[…, ⌈out · bits / 32⌉, groups]``, packed along ``out``.
        g_idx: I32 ``[in]``, the group of each column (compressed-tensors before August 2026, ``actorder: group``).
    """

    def alignment(self, shape: tuple[int, ...], n_rows: int, storage: Storage) -> tuple[int, int]:
        """Return the lines at which a word of zeros begins; 1 without zeros, and where a row is a whole matrix."""
        settings = dict(storage.settings)
        if not settings["zero"] or (len(shape) > 2 and n_rows == shape[0]):
            return 1, 1
        return codes_at_word_edges(int(settings["bits"])), 1

    def ranges(self, tile: Tile, storage: Storage) -> Mapping[str, PartRange]:
        """Return the ranges of codes, scales and zeros: each is one run of bytes. Of ``g_idx`` all is needed."""
        settings, lines = dict(storage.settings), lines_of(tile)
        bits, groups = int(settings["bits"]), groups_of(lines.width, int(settings["group"]))
        found = {
            WEIGHT: by_line(lines, "I32", words_of(lines.width, bits)),
            "scale": by_line(lines, str(settings["scale"]), groups),
        }
        if settings["zero"]:
            *_, (_, last) = spans = [words for _, words in _zero_words(lines, bits)]
            first, row = spans[0][0], nbytes_of("I32", (groups,))
            span = (first * row, (last - first) * row)
            found["zero"] = PartRange("I32", (last - first, groups), (span,))
        if settings["g_idx"]:
            found["g_idx"] = whole("I32", (lines.width,))
        return found

    def decode(
        self, tile: Tile, parts: Mapping[str, torch.Tensor], out: torch.Tensor, storage: Storage
    ) -> None:
        """Unpack the codes, and apply the zero and the scale of each group."""
        settings, lines = dict(storage.settings), lines_of(tile)
        bits, codes = int(settings["bits"]), out.view(lines.n, lines.width)
        scale, offset = parts["scale"].float(), 1 << (bits - 1)
        # Codes and zeros are both offset, so that the offsets cancel.
        zero = _zeros(lines, parts["zero"], bits) if settings["zero"] else None
        has_index, group = _has_index(parts), int(settings["group"])
        table = whole_numbers(bits, offset if zero is None else 0)
        if not has_index and decode(parts[WEIGHT], table, scale, codes, group=group, zero=zero):
            return
        for few, words in _few(lines, codes, parts[WEIGHT]):
            few.copy_(unpack(words, bits, lines.width))
        if zero is None:
            zero = scale.new_full(scale.shape, offset)
        if has_index:
            dequantise_by_index(codes, zero, scale, parts["g_idx"])
        else:
            dequantise(codes, zero, scale, group)

    def on_stored(
        self,
        tile: Tile,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        stored: Mapping[str, torch.Tensor],
    ) -> Grid:
        """Return the grid of the stored scales and zeros."""
        settings, lines = dict(storage.settings), lines_of(tile)
        bits = int(settings["bits"])
        # Codes and zeros are both offset. Without zeros the levels are what codes stand for.
        offset = 0 if settings["zero"] else 1 << (bits - 1)

        def keep(levels: torch.Tensor) -> None:
            for few, words in _few(lines, levels, out[WEIGHT]):
                words.copy_(pack(whole_codes(few.add_(offset)), bits))

        scale = stored["scale"].float()
        found = stored_grid(
            Integers(-offset, (1 << bits) - 1 - offset),
            keep,
            lambda: unpack(stored[WEIGHT], bits, lines.width).float().sub_(offset),
            scale,
            zero=_zeros(lines, stored["zero"], bits) if settings["zero"] else None,
            group=grouping(stored["g_idx"]) if _has_index(stored) else int(settings["group"]),
        )
        codes = None
        if bits in {4, 8}:
            levels = whole_numbers(bits, offset)
            codes = Codes.of(out[WEIGHT], bits, offset=offset, stored=stored[WEIGHT], levels=levels)
        return stored_at_once(found, scale, codes)

    def fresh(
        self,
        tile: Tile,
        values: torch.Tensor,
        out: Mapping[str, torch.Tensor],
        storage: Storage,
        survey: torch.Tensor | None,
    ) -> Grid:
        """Make scales of the values, see `lora_merge.codecs.fresh_packed.grid`."""
        del survey
        return fresh_packed.grid(tile, values, out, storage)

    def fresh_alignment(self, shape: tuple[int, ...], storage: Storage) -> int:
        """Return the rows of a matrix that share a word of zeros."""
        return fresh_packed.fresh_alignment(storage, shape)

    def parts(self, shape: tuple[int, ...], storage: Storage) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return codes, scales, perhaps zeros, and ``weight_shape``, which says how many codes of a line are meant."""
        settings, (*stack, rows, width) = dict(storage.settings), shape
        bits, groups = int(settings["bits"]), groups_of(width, int(settings["group"]))
        found = {
            WEIGHT: ("I32", (*stack, rows, words_of(width, bits))),
            "scale": (str(settings["scale"]), (*stack, rows, groups)),
        }
        if settings["zero"]:
            found["zero"] = ("I32", (*stack, words_of(rows, bits), groups))
        return found | {"weight_shape": ("I64", (2,))}


def _few(
    lines: Lines, values: torch.Tensor, words: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the values and the words of a few lines at a time, for which no new memory has to be mapped."""
    import torch

    n = max(_AT_ONCE // lines.width, 1)
    yield from zip(torch.split(values, n), torch.split(words, n), strict=True)


def _has_index(parts: Mapping[str, torch.Tensor]) -> bool:
    # An index with -1 in it was never filled: the groups are in order, as compressed-tensors took them.
    return "g_idx" in parts and int(parts["g_idx"].min()) >= 0


def _zero_words(lines: Lines, bits: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield, for each matrix that a tile has some lines of, these lines, and the rows of words that hold their zeros; both
    are numbered through all matrices.
    """
    n_words = words_of(lines.rows, bits)
    for matrix in range(*lines.matrices):
        before = matrix * lines.rows
        start, end = max(lines.start, before), min(lines.end, before + lines.rows)
        words = (start - before) * bits // WORD_BITS, words_of(end - before, bits)
        yield (start, end), (matrix * n_words + words[0], matrix * n_words + words[1])


def _zeros(lines: Lines, stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the zeros of some lines as they are stored: float32 ``[lines, groups]``."""
    import torch

    words = along_lines(stored, 0, stored.shape[1])
    zeros = torch.empty(lines.n, words.shape[0], device=stored.device)
    first_word = None
    for (start, end), (first, last) in _zero_words(lines, bits):
        first_word = first if first_word is None else first_word
        found = unpack(words[:, first - first_word : last - first_word], bits, end - start)
        zeros[start - lines.start : end - lines.start].copy_(found.T)
    return zeros
