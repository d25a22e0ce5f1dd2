"""Lines that compiled code rounds (`lora_merge.native`), in NumPy: values or stored codes become levels or codes."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.codecs.compiled import coded_of, stride_of
from lora_merge.codecs.lattice import E4M3, PLAIN, Floats, Integers
from lora_merge.native.library import STRIP, Job, Lattice, Product, Sweep, library
from lora_merge.rounding.bands import REACH

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from lora_merge.codecs.lattice import Lattice as AnyLattice
    from lora_merge.rounding.feedback import Feedback

    Numbers = np.ndarray[Any, np.dtype[np.float32]]
    Groups = np.ndarray[Any, np.dtype[np.int32]]
    Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_INTEGERS, _FLOATS, _BFLOAT16 = range(3)


class Scales(NamedTuple):
    """The grid of some lines: a level stands for ``(level - zero) · scale + bias``.

    Shapes:
        scale, zero, bias: ``[lines, groups]``, the groups of a line beside each other; None for 1, 0 and 0.
    """

    lattice: AnyLattice
    group: int | Groups
    """Adjacent values of a group, 0 for the whole line; or the group of each column."""

    scale: Numbers | None = None
    zero: Numbers | None = None
    bias: Numbers | None = None


class Place(NamedTuple):
    """Where codes are stored: lines of bytes, see `lora_merge.codecs.grid.Codes`."""

    out: Bytes
    bits: int
    offset: int
    stored: Bytes | None
    keeps_signs: bool


class Added(NamedTuple):
    """``factor · left @ right``, float32."""

    left: Numbers
    right: Numbers
    factor: float


def merge_codes(
    stored: Bytes,
    levels: Numbers,
    scales: Scales,
    added: Added,
    feedback: Feedback,
    place: Place,
    *,
    is_fed_back: bool = True,
) -> Numbers | None:
    """Round what stored codes stand for, with a product added, and store the new codes. A few lines are computed at a time: no tile of
    values is in memory. Return the error ``(stored - values) Qᵀ``, ``[lines, r]``, or None: then nothing is stored.

    Args:
        stored: the codes, lines of bytes in one piece.
        levels: the level of each code.
        scales: those that the codes have, and keep.
        added: what is added.
        feedback: of the adapter's row space.
        place: where the new codes are stored.
        is_fed_back: False for the nearest levels, of which only the error is wanted.
    """
    left, right, factor = added
    if scales.scale is None or scales.bias is not None or not isinstance(scales.group, int):
        return None
    if any(part.strides[1] != part.itemsize for part in (left, right)):
        return None
    shape = len(left), right.shape[1]
    coded = coded_of(
        stored,
        levels,
        scales.scale,
        shape,
        group=scales.group,
        zero=scales.zero,
        is_e4m3=scales.lattice == E4M3,
    )
    if coded is None:
        return None
    assert place.out.shape == stored.shape, "a tile's codes are stored as a whole"
    product = product_of(left, right, factor)
    source = {
        "n_lines": shape[0],
        "n_columns": shape[1],
        "coded": ctypes.addressof(coded),
        "product": ctypes.addressof(product),
    }
    return store(source, scales, feedback, place, is_fed_back=is_fed_back)


def product_of(left: Numbers, right: Numbers, factor: float) -> Product:
    """Return a product as compiled code reads it. It has the addresses of the arrays, and does not keep them."""
    return Product(
        n_rows=len(left),
        n_columns=right.shape[1],
        left=left.ctypes.data,
        left_stride=left.strides[0] // left.itemsize,
        right=right.ctypes.data,
        right_stride=right.strides[0] // right.itemsize,
        rank=len(right),
        scale=factor,
    )


def store(
    source: Mapping[str, Any], scales: Scales, feedback: Feedback, place: Place, *, is_fed_back: bool
) -> Numbers | None:
    """Round what a source has, and store the codes. Return the error, or None: then nothing is stored.

    Args:
        source: fields of a `Job`: lines, columns, and where values or codes are.
        scales: of these lines.
        feedback: of the adapter's row space.
        place: where codes are stored.
        is_fed_back: as in `merge_codes`.
    """
    stored = place.stored if place.keeps_signs else None
    target = {
        "codes": place.out.ctypes.data,
        "code_stride": _line_bytes(place.out),
        "bits": place.bits,
        "offset": place.offset,
        "stored": None if stored is None else stored.ctypes.data,
    }
    error = round_lines(source, scales, feedback, target, is_fed_back=is_fed_back)
    used = -(-source["n_columns"] * place.bits // 8)
    if error is not None and used < place.out.shape[1]:
        # What is left of the last word is 0, as `lora_merge.codecs.bits.pack` has it; the buffer is that of earlier tiles.
        place.out[:, used:] = 0
    return error


def _line_bytes(codes: Bytes) -> int:
    return codes.strides[0] if len(codes) > 1 else codes.nbytes


def round_lines(
    source: Mapping[str, Any],
    scales: Scales,
    feedback: Feedback,
    target: Mapping[str, Any],
    *,
    is_fed_back: bool,
) -> Numbers | None:
    """Round some lines. Return the error ``(stored - values) Qᵀ``, or None: then nothing is written.

    Args:
        source: as in `store`; target: fields of a `Job` that say where levels or codes are written.
        scales: as there; feedback: as there; is_fed_back: as there.
    """
    import numpy as np

    found, lattice = library(), _lattice(scales.lattice)
    if found is None or lattice is None:
        return None
    n_lines, n_columns = source["n_lines"], source["n_columns"]
    flat, rank = feedback.flat, len(feedback.basis)
    pulls = flat.pulls if is_fed_back else None
    assert is_fed_back == (pulls is not None), "a schedule without feedback is for the nearest levels"
    group = _group(n_columns, scales.group) if isinstance(scales.group, int) else scales.group
    error = np.empty((n_lines, rank), np.float32)
    sweeps = (Sweep * len(flat.sweeps))(
        *(Sweep(*(part.ctypes.data for part in (s.sizes, s.pulls, s.shares))) for s in flat.sweeps)
    )
    parts = {
        name: part
        for name, part in (("scale", scales.scale), ("zero", scales.zero), ("bias", scales.bias))
        if part is not None
    }
    found.round(
        Job(
            group=group.ctypes.data,
            lattice=lattice,
            rank=rank,
            sizes=flat.sizes.ctypes.data,
            pulls=None if pulls is None else pulls.ctypes.data,
            pushes=flat.pushes.ctypes.data,
            again=flat.again if is_fed_back else n_columns,
            n_sweeps=len(sweeps) if is_fed_back else 0,
            sweeps=ctypes.addressof(sweeps),
            error=error.ctypes.data,
            **{name: part.ctypes.data for name, part in parts.items()},
            **{f"{name}_stride": stride_of(part) for name, part in parts.items()},
            **source,
            **target,
        )
    )
    return error


@lru_cache
def _group(n_columns: int, size: int) -> Groups:
    """Return the group of each column."""
    import numpy as np

    return np.arange(n_columns, dtype=np.int32) // np.int32(size or n_columns)


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
