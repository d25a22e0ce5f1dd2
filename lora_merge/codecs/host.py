"""Codes of four or eight bits with scales, decoded without torch, with the bits of their codecs (`scaled`, `fp4`, `packed_int`)."""

from __future__ import annotations

from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.codecs.geometry import groups_of, lines_of
from lora_merge.codecs.lattice import E2M1, Integers
from lora_merge.codecs.scaled import LATTICES
from lora_merge.core.weight import WEIGHT
from lora_merge.runtime.host_floats import host_floats

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from lora_merge.codecs.geometry import Lines
    from lora_merge.codecs.lattice import Lattice
    from lora_merge.core.weight import Storage, Tile

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_FLOATS = {"F32", "BF16", "F16"}
_BYTES = {"F8_E8M0", "U8", "F8_E4M3"}
"""Dtypes of scales: floating-point numbers, and codes of eight bits."""


class _Coding(NamedTuple):
    """How a storage codes values."""

    lattice: Lattice
    levels: str
    """What its codes are, for `levels_of`."""

    bits: int
    group: int
    block: int
    """Lines with one line of scales; 0 for all of a matrix."""

    scale: str
    """Dtype of the scales."""

    overall: str = "none"
    """What is done with the scale of the whole tensor."""


# Asked for every tile, of a few storages.
@lru_cache
def _coding(storage: Storage) -> _Coding | None:
    settings = dict(storage.settings)
    match storage.codec:
        case "scaled":
            codes, block = str(settings["codes"]), int(settings["block_rows"])
            group, scale = int(settings["block_columns"]), str(settings["scale"])
            return _Coding(LATTICES[codes], codes, 8, group, block, scale)
        case "fp4":
            scale, overall = f"F8_{settings['scale']}", str(settings["global"])
            return _Coding(E2M1, "E2M1", 4, int(settings["group"]), 1, scale, overall)
        case "packed_int" if settings["bits"] in {4, 8} and not (settings["zero"] or settings["g_idx"]):
            bits, group = int(settings["bits"]), int(settings["group"])
            half = 1 << (bits - 1)
            levels = f"{bits} bits"
            return _Coding(Integers(-half, half - 1), levels, bits, group, 1, str(settings["scale"]))
    return None


class HostGrid(NamedTuple):
    """The codes of a tile and their grid, as `lora_merge.codecs.grid.Grid` has it.

    Shapes:
        stored: ``[lines, bytes]``; levels: ``[2^bits]``, what each code stands for; scale: ``[lines, groups]``, positive.
    """

    stored: Bytes
    width: int
    """Values of a line."""

    bits: int
    """Of a code; the low ones of a byte first."""

    lattice: Lattice
    levels: Numbers
    scale: Numbers
    group: int

    @property
    def offset(self) -> int:
        """What is added to a whole number, whose lower bits are its code."""
        # Bytes in two's complement need none.
        return -int(self.levels[0]) if isinstance(self.lattice, Integers) and self.levels[0] < 0 else 0

    @property
    def keeps_signs(self) -> bool:
        """True where there are two zeros."""
        return not isinstance(self.lattice, Integers)

    def values(self, stored: Bytes) -> Numbers:
        """Return what the codes of the first lines stand for, float32 ``[lines, in]``.

        Shapes:
            stored: ``[lines, bytes]``.
        """
        import numpy as np

        codes = stored if self.bits == 8 else np.stack([stored & 15, stored >> 4], 2).reshape(len(stored), -1)
        with np.errstate(all="ignore"):  # what is too large becomes infinite, as with torch
            found: Numbers = self.levels[codes[:, : self.width]] * self.spread(len(stored))
        return found

    def spread(self, n_lines: int) -> Numbers:
        """Return the scale of each value of the first lines."""
        import numpy as np

        found: Numbers = np.repeat(self.scale[:n_lines], self.group or self.width, 1)[:, : self.width]
        return found


def is_host(storage: Storage, shape: tuple[int, ...]) -> bool:
    """Return whether a weight of a shape can be decoded here."""
    if len(shape) != 2 or storage.codec not in {"scaled", "fp4", "packed_int"}:
        return False
    coding = _coding(storage)
    return coding is not None and coding.scale in _FLOATS | _BYTES and coding.group * coding.bits % 8 == 0


def host_grid(tile: Tile, parts: Mapping[str, Bytes], storage: Storage) -> HostGrid | None:
    """Return the grid of a tile, for whose storage `is_host` is true; None where a scale is not a positive number.

    Args:
        tile: which rows.
        parts: role → the bytes that `Codec.ranges` says.
        storage: of the weight.
    """
    import numpy as np

    lines, of = lines_of(tile), _coding(storage)
    assert of is not None
    scale = _scale(parts, of, lines)
    if not (np.isfinite(scale) & (scale > 0)).all():
        return None
    if of.block != 1:
        first = lines.block_row(lines.start, of.block)
        scale = scale[[lines.block_row(line, of.block) - first for line in range(lines.start, lines.end)]]
    stored = parts[WEIGHT].reshape(lines.n, -1)
    return HostGrid(stored, lines.width, of.bits, of.lattice, levels_of(of.levels), scale, of.group)


def _scale(parts: Mapping[str, Bytes], of: _Coding, lines: Lines) -> Numbers:
    """Return the scales with that of the whole tensor applied, float32 ``[lines of scales, groups]``."""
    import numpy as np

    raw = parts["scale"]
    scale = host_floats(raw.data, of.scale) if of.scale in _FLOATS else levels_of(of.scale)[raw]
    scale = scale.reshape(-1, groups_of(lines.width, of.group))
    if of.overall == "none":
        return scale
    overall = host_floats(parts["global"].data, "F32")
    with np.errstate(all="ignore"):  # what is not finite is not taken
        return scale / overall if of.overall == "divide" else scale * overall


@lru_cache
def levels_of(codes: str) -> Numbers:
    """Return what each code is before any scale, float32.

    Args:
        codes: bytes, ``"F8_E4M3"``, ``"F8_E5M2"``, ``"I8"``, or ``"F8_E8M0"``, also spelled ``"U8"``, for powers of two; or codes of four
            bits, ``"E2M1"``; or whole numbers that half of them is added to, ``"4 bits"`` and ``"8 bits"``.
    """
    import numpy as np

    match codes:
        case "I8":
            return np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)
        case "4 bits" | "8 bits":
            n = 1 << int(codes[0])
            return np.arange(n, dtype=np.float32) - n // 2
        case "F8_E8M0" | "U8":
            return np.array([*(2.0 ** (code - 127) for code in range(255)), nan], np.float32)
        case "E2M1":
            return np.array([_small_float(code, 1, 2, 1) for code in range(16)], np.float32)
        case "F8_E4M3":
            found = np.array([_small_float(code, 3, 4, 7) for code in range(256)], np.float32)
            found[[0x7F, 0xFF]] = nan
            return found
    # E5M2 has infinities.
    found = np.array([_small_float(code, 2, 5, 15) for code in range(256)], np.float32)
    infinite = np.array([np.inf, nan, nan, nan], np.float32)
    found[0x7C:0x80], found[0xFC:] = infinite, -infinite
    return found


def _small_float(code: int, mantissa_bits: int, exponent_bits: int, bias: int) -> float:
    """Return the value of a code, as if all exponents were of numbers (OCP 8-bit Floating Point 1.0, Microscaling Formats 1.0)."""
    fraction = code & ((1 << mantissa_bits) - 1)
    exponent = code >> mantissa_bits & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    if not exponent:
        return sign * fraction * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + fraction / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
