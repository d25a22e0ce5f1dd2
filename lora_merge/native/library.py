"""The compiled library: where it is, what it takes, and whether this machine can use it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

SWITCH = "LORA_MERGE_NATIVE"
"""Environment variable: ``0`` leaves the library out."""

VERSION = 5
"""``lines_version`` of ``kernels.c``. A library that was compiled from other sources takes other structures."""

STRIP = 64
"""Columns that are loaded together, as in ``kernels.c``: no block of columns goes from one strip into the next."""

_pointer, _int, _long, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Lattice(ctypes.Structure):
    """``struct lattice``."""

    _fields_ = (
        ("kind", _int),
        ("first", _float),
        ("last", _float),
        ("reach", _float),
        ("smallest", _float),
        ("largest", _float),
        ("big", _float),
        ("shift", _int),
        ("below", _int),
        ("spacings", _float),
    )


class Sweep(ctypes.Structure):
    """``struct sweep``."""

    _fields_ = (("sizes", _pointer), ("pulls", _pointer), ("shares", _pointer))


class Job(ctypes.Structure):
    """``struct job``: lines that are rounded."""

    _fields_ = (
        ("n_lines", _long),
        ("n_columns", _long),
        ("values", _pointer),
        ("stride", _long),
        ("coded", _pointer),
        ("product", _pointer),
        ("scale", _pointer),
        ("zero", _pointer),
        ("bias", _pointer),
        ("scale_stride", _long),
        ("zero_stride", _long),
        ("bias_stride", _long),
        ("group", _pointer),
        ("lattice", Lattice),
        ("rank", _int),
        ("sizes", _pointer),
        ("pulls", _pointer),
        ("pushes", _pointer),
        ("again", _long),
        ("n_sweeps", _int),
        ("sweeps", _pointer),
        ("levels", _pointer),
        ("stride_out", _long),
        ("codes", _pointer),
        ("code_stride", _long),
        ("bits", _int),
        ("offset", _int),
        ("stored", _pointer),
        ("error", _pointer),
    )


class Coded(ctypes.Structure):
    """``struct coded``: lines of codes that are decoded."""

    _fields_ = (
        ("n_lines", _long),
        ("n_columns", _long),
        ("codes", _pointer),
        ("code_stride", _long),
        ("bits", _int),
        ("table", _pointer),
        ("scale", _pointer),
        ("scale_stride", _long),
        ("zero", _pointer),
        ("zero_stride", _long),
        ("group", _long),
        ("is_e4m3", _int),
        ("values", _pointer),
        ("stride", _long),
    )


_VECTORS = {16: "AVX-512", 8: "AVX2", 4: "NEON"}


class Product(ctypes.Structure):
    """``struct product``: rows of bfloat16, to which a product is added."""

    _fields_ = (
        ("n_rows", _long),
        ("n_columns", _long),
        ("base", _pointer),
        ("out", _pointer),
        ("left", _pointer),
        ("left_stride", _long),
        ("right", _pointer),
        ("right_stride", _long),
        ("rank", _int),
        ("scale", _float),
    )


class Projected(ctypes.Structure):
    """``struct projected``: rows that are multiplied by weights."""

    _fields_ = (
        ("n_rows", _long),
        ("n_groups", _long),
        ("pitch", _long),
        ("taken", _int),
        ("values", _pointer),
        ("x", _pointer),
        ("products", _pointer),
        ("lengths", _pointer),
    )


class Library(NamedTuple):
    """The functions, and the vectors that they use here."""

    functions: ctypes.CDLL
    lanes: int
    """Float32 numbers of a vector: 16 with AVX-512, 8 with AVX2, 4 on ARM64."""

    @property
    def vectors(self) -> str:
        """The name of the processor's instructions."""
        return _VECTORS[self.lanes]

    def round(self, job: Job) -> None:
        """Choose the levels of some lines.

        Raises:
            MemoryError: there is no memory for the strips of a few lines.
        """
        if self.functions.lines_round(ctypes.byref(job), self.lanes):
            raise MemoryError("no memory to round a tile")

    def add(self, product: Product) -> bool:
        """Add a product to some rows. Return whether all that is written is finite; if not, it is not torch's NaN."""
        return not self.functions.lines_add(ctypes.byref(product), self.lanes)

    def squares(self, address: int, n: int) -> float:
        """Return the sum of the squares of some bfloat16 values, in float64.

        Args:
            address: of the first; n: how many, adjacent.
        """
        found: float = self.functions.lines_squares(_pointer(address), _long(n), self.lanes)
        return found

    def project(self, projected: Projected) -> None:
        """Multiply some columns of some rows by weights. Subnormal numbers count as zero."""
        self.functions.lines_project(ctypes.byref(projected), self.lanes)

    def decode(self, coded: Coded) -> None:
        """Write the values of some lines."""
        self.functions.lines_decode(ctypes.byref(coded), self.lanes)


class _Switch:
    """Whether the library is left out for now."""

    is_off = False


@lru_cache(1)
def _found() -> Library | None:
    if os.environ.get(SWITCH) == "0":
        return None
    for file in sorted(Path(__file__).parent.glob("_kernels*.so")):
        # One that was built for another system, with another C library or of other sources is as good as none.
        with contextlib.suppress(OSError, AttributeError):
            functions = ctypes.CDLL(str(file))
            lanes = functions.lines_lanes() if functions.lines_version() == VERSION else 0
            if lanes:
                functions.lines_squares.restype = ctypes.c_double
                return Library(functions, lanes)
    return None


def library() -> Library | None:
    """Return the compiled functions; None where they are not built, this processor has no vectors for them, or `SWITCH` is 0."""
    return None if _Switch.is_off else _found()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """While in this context, no thread finds the library: what it does is done with torch."""
    before, _Switch.is_off = _Switch.is_off, True
    try:
        yield
    finally:
        _Switch.is_off = before
