"""One byte for each value and scales of blocks (`lora_merge.codecs.scaled`), decoded without torch, with the same bits."""

from __future__ import annotations

from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.codecs.geometry import groups_of, lines_of
from lora_merge.codecs.scaled import LATTICES, SCALE, settings_of
from lora_merge.core.weight import WEIGHT
from lora_merge.runtime.host_floats import host_floats

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from lora_merge.codecs.lattice import Lattice
    from lora_merge.core.weight import Storage, Tile

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_FLOATS = {"F32", "BF16", "F16"}
_POWERS = {"F8_E8M0", "U8"}
"""Dtypes of scales: floating-point numbers, and bytes that are powers of two."""


class HostGrid(NamedTuple):
    """The codes of a tile and their grid, as `lora_merge.codecs.grid.Grid` has it.

    Shapes:
        codes: ``[lines, in]``; levels: ``[256]``, what each code stands for; scale: ``[lines, groups]``, positive.
    """

    codes: Bytes
    lattice: Lattice
    levels: Numbers
    scale: Numbers
    group: int

    @property
    def keeps_signs(self) -> bool:
        """True where there are two zeros."""
        return self.lattice != LATTICES["I8"]

    def values(self, codes: Bytes) -> Numbers:
        """Return what the codes of the first lines stand for, float32 ``[lines, in]``.

        Shapes:
            codes: ``[lines, in]``.
        """
        return self.levels[codes] * self.spread(len(codes))

    def spread(self, n_lines: int) -> Numbers:
        """Return the scale of each value of the first lines."""
        import numpy as np

        width = self.codes.shape[1]
        found: Numbers = np.repeat(self.scale[:n_lines], self.group or width, 1)[:, :width]
        return found


def is_host(storage: Storage, shape: tuple[int, ...]) -> bool:
    """Return whether a weight of a shape can be decoded here."""
    return storage.codec == "scaled" and len(shape) == 2 and settings_of(storage).scale in _FLOATS | _POWERS


def host_grid(tile: Tile, parts: Mapping[str, Bytes], storage: Storage) -> HostGrid | None:
    """Return the grid of a tile; None where a scale is not a positive number.

    Args:
        tile: which rows.
        parts: role → the bytes that `Scaled.ranges` says.
        storage: of the weight.
    """
    import numpy as np

    lines, of = lines_of(tile), settings_of(storage)
    raw = parts[SCALE]
    stored = host_floats(raw.data, of.scale) if of.scale in _FLOATS else _powers()[raw]
    stored = stored.reshape(-1, groups_of(lines.width, of.block_columns))
    if not (np.isfinite(stored) & (stored > 0)).all():
        return None
    first = lines.block_row(lines.start, of.block_rows)
    rows = [lines.block_row(line, of.block_rows) - first for line in range(lines.start, lines.end)]
    codes = parts[WEIGHT].reshape(lines.n, lines.width)
    return HostGrid(codes, LATTICES[of.codes], levels_of(of.codes), stored[rows], of.block_columns)


@lru_cache
def _powers() -> Numbers:
    """Return the power of two of each byte; 255 is NaN."""
    import numpy as np

    return np.array([*(2.0 ** (code - 127) for code in range(255)), nan], np.float32)


@lru_cache
def levels_of(codes: str) -> Numbers:
    """Return what each byte is before any scale: ``[256]``, of ``"F8_E4M3"``, ``"F8_E5M2"`` or ``"I8"``."""
    import numpy as np

    if codes == "I8":
        return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
    return np.array([_float8(byte, codes) for byte in range(256)], np.float32)


def _float8(byte: int, dtype: str) -> float:
    """Return the value of a code of FP8 (OCP 8-bit Floating Point 1.0)."""
    mantissa_bits, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    exponent, fraction = byte >> mantissa_bits & (0x7F >> mantissa_bits), byte & ((1 << mantissa_bits) - 1)
    sign = -1.0 if byte & 0x80 else 1.0
    if dtype == "F8_E4M3" and byte & 0x7F == 0x7F:
        return nan
    if dtype == "F8_E5M2" and exponent == 0x1F:
        return nan if fraction else sign * float("inf")
    if not exponent:
        return sign * fraction * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + fraction / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
