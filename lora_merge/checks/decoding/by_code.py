"""Rows of codes and of their scales, taken apart without torch: for the storages in which a code's value times its scale is all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.checks.decoding.raw import E2M1, byte_values
from lora_merge.checks.floats import numbers_in
from lora_merge.core.weight import WEIGHT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from lora_merge.checks.reading import Bytes
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Storage, Weight

    Wide = np.ndarray[Any, np.dtype[np.float64]]
    Small = np.ndarray[Any, np.dtype[np.uint8]]
    Read = Callable[[TensorRef, Sequence[int], int], Bytes | None]
    """A part, rows, and how many rows it is divided into → their bytes."""

_SCALES = {"E8M0": "F8_E8M0", "E4M3": "F8_E4M3"}


class Coded(NamedTuple):
    """Rows of a weight, each value of which is ``meaning[code] · scale``.

    Shapes:
        codes: ``[rows, columns]``; scales: ``[rows, groups]``, positive.
    """

    codes: Small
    scales: Wide


class Coding(NamedTuple):
    """What the codes of a storage mean, and how they are scaled."""

    meaning: tuple[float, ...]
    """What each code stands for; NaN for nothing."""

    group: int
    """Adjacent values of a row with one scale; 0 for the whole row."""

    block: int
    """Rows with one row of scales; 0 for all."""

    scale: str
    """What the bytes of a scale are, where the file calls them integers; empty if it cannot."""

    whole: str
    """How the scale of the whole tensor is applied: ``"divide"``, ``"multiply"`` or ``"none"``."""

    @property
    def n_products(self) -> int:
        """The number of products in float32 that a value is decoded with."""
        return 1 if self.whole == "none" else 2


def coding_of(storage: Storage, shape: tuple[int, ...]) -> Coding | None:
    """Return the coding of a storage; None for others than those that are taken apart here."""
    settings = dict(storage.settings)
    if len(shape) != 2:
        return None
    match storage.codec:
        case "scaled":
            codes = str(settings["codes"])
            meaning = tuple(map(_signed, range(256))) if codes == "I8" else byte_values(codes)
            return Coding(
                meaning, int(settings["block_columns"]), int(settings["block_rows"]), "F8_E8M0", "none"
            )
        case "fp4":
            scale = _SCALES[str(settings["scale"])]
            return Coding(E2M1, int(settings["group"]), 1, scale, str(settings["global"]))
        case "packed_int" if settings["bits"] in {4, 8} and not (settings["g_idx"] or settings["zero"]):
            bits = int(settings["bits"])
            meaning = tuple(float(code - (1 << bits - 1)) for code in range(1 << bits))
            return Coding(meaning, int(settings["group"]), 1, "", "none")
    return None


def _signed(byte: int) -> float:
    return float(byte - 256 if byte >= 128 else byte)


def coded_rows(read: Read, weight: Weight, coding: Coding, rows: Sequence[int]) -> Coded | None:
    """Return some rows of a weight; None where they are stored otherwise than `coding_of` expects, or a scale is not a positive number.

    Args:
        read: reads parts.
        weight: the weight.
        coding: of its storage.
        rows: their numbers.
    """
    import numpy as np

    height, width = weight.shape
    found = read(weight.parts[WEIGHT], rows, height)
    if found is None:
        return None
    codes = np.frombuffer(found.content, np.uint8).reshape(len(rows), -1)
    if len(coding.meaning) == 16:
        # The low half of a byte is the first.
        codes = np.stack([codes & 15, codes >> 4], 2).reshape(len(rows), -1)
    scales = _scales(read, weight, coding, rows)
    if scales is None or scales.shape[1] != -(-width // (coding.group or width)) or codes.shape[1] < width:
        return None
    if not (np.isfinite(scales) & (scales > 0)).all():
        return None
    return Coded(codes[:, :width], scales)


def _scales(read: Read, weight: Weight, coding: Coding, rows: Sequence[int]) -> Wide | None:
    """Return the scale of each group of some rows, float64 ``[rows, groups]``."""
    import numpy as np

    height = weight.shape[0]
    block = coding.block or height
    own = [row // block for row in rows]
    distinct = sorted(set(own))
    stored = read(weight.parts["scale"], distinct, -(-height // block))
    found = None if stored is None else numbers_of(*stored, len(distinct), coding.scale)
    if found is None:
        return None
    if coding.whole != "none":
        stored = read(weight.parts["global"], [0], 1)
        whole = None if stored is None else numbers_of(*stored, 1)
        if whole is None or whole.size != 1:
            return None
        found = found / whole if coding.whole == "divide" else found * whole
    return found[np.searchsorted(distinct, own)]


def numbers_of(content: bytearray, dtype: str, n_rows: int, meant: str = "") -> Wide | None:
    """Return bytes as float64, a row for each of ``n_rows``; None where their dtype is none of those that scales have.

    Args:
        content: the bytes.
        dtype: what the file says they are.
        n_rows: of how many rows they are.
        meant: what single bytes mean, such as ``"F8_E8M0"``; empty if they cannot be scales.
    """
    import numpy as np

    numbers = numbers_in(content, dtype, n_rows)
    if numbers is not None:
        return numbers.astype(np.float64)
    if not meant or dtype not in {"U8", meant}:
        return None
    return np.array(byte_values(meant))[np.frombuffer(content, np.uint8)].reshape(n_rows, -1)
