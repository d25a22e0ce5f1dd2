"""Some columns of a row tile as a float32 matrix, so that it is multiplied by weights at the speed of memory.

Two neighbouring bfloat16 values, read as one float32, are the second of them: the first fills the lower half of its
mantissa, which is less than one unit in the last place of bfloat16. So nothing need be widened, and a tile's bytes may be
looked at from any of its values on. Nothing here shares memory with what the merge made of them.
"""

from __future__ import annotations

import random
import zlib
from ctypes import addressof, c_char
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.native.library import Projected, library

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lora_merge.native.library import Library

    Numbers = np.ndarray[Any, np.dtype[np.float32]]

GROUP = 32
"""The fewest values of a group; a row has one product for each group."""

MOST_GROUPS = 4
"""The most groups of a row. With more of them small errors stand out more, and a tile takes longer."""

TAKEN = 64
"""The most values of a group that are multiplied, adjacent ones."""

_POOL = 1 << 12


@dataclass(frozen=True, slots=True)
class Pattern:
    """The columns that are multiplied: the same ones in each group of every row, as float32 values.

    Args:
        columns: of a row; halved: two BF16 columns are one value.
        groups: of a row; width: values of a group; taken: values of each that are multiplied.
        first: the column that the first of them begins at.
    """

    columns: int
    halved: bool
    groups: int
    width: int
    taken: int
    first: int

    @classmethod
    def of(cls, name: str, columns: int, *dtypes: str) -> Pattern:
        """Return the pattern for a tensor. It is drawn from the name, so that over the tensors all columns have their
        turn.
        """
        halved = set(dtypes) == {"BF16"} and columns % 2 == 0 and columns >= 4
        n, step = (columns // 2, 2) if halved else (columns, 1)
        groups = next((k for k in range(min(n // GROUP, MOST_GROUPS), 1, -1) if n % k == 0), 1)
        width = n // groups
        taken = min(width, TAKEN)
        room = (width - taken) * step
        drawn = zlib.crc32(name.encode())
        if halved and not room:  # the even columns, but for the first
            return cls(columns, halved, groups, width, taken - drawn % 2, drawn % 2)
        first = drawn % 4 * (room // 4)  # few patterns, so that views can be used again
        if halved:  # odd columns: what is not aligned is slower by three times, and has its turn in one tensor of four
            first = first // 2 * 2 + (drawn // 4 % 4 == 0)
        return cls(columns, halved, groups, width, taken, first)

    def numbers(self) -> np.ndarray[Any, np.dtype[np.intp]]:
        """Return the numbers of the columns that are multiplied, ``[groups, taken]``."""
        import numpy as np

        step = 2 if self.halved else 1
        firsts = self.first + step - 1 + np.arange(self.groups) * (self.width * step)
        return firsts[:, None] + np.arange(self.taken) * step

    def select(self, matrix: torch.Tensor) -> torch.Tensor:
        """Return the columns that are multiplied, ``[rows, groups, taken]``, of a contiguous ``[rows, columns]``."""
        step = 2 if self.halved else 1
        size, strides = (len(matrix), self.groups, self.taken), (self.columns, self.width * step, step)
        return matrix.as_strided(size, strides, matrix.storage_offset() + self.first + step - 1)


class TileViews:
    """Views of a tile's bytes for multiplying. They are made once for a buffer, whatever is in it later.

    Args:
        content: the bytes, ``[rows, columns]`` of a dtype.
        rows: of the tile; dtype: safetensors code.
        pattern: which columns.
        whole: the norms are those of whole rows.
    """

    def __init__(
        self, content: memoryview, rows: int, dtype: str, pattern: Pattern, *, whole: bool = False
    ) -> None:
        import torch

        columns, width, taken = pattern.columns, pattern.width, pattern.taken
        size = (rows * pattern.groups, taken)
        self._flushing = Flushing(wanted=pattern.halved and has_subnormals())
        self._whole = whole
        self._stored = torch.frombuffer(content, dtype=getattr(torch, TORCH_NAMES[dtype])).view(rows, columns)
        self._narrow: torch.Tensor | None = None
        if pattern.halved or dtype == "F32":
            start = pattern.first * (2 if pattern.halved else 4)
            flat = torch.frombuffer(
                content, dtype=torch.float32, offset=start, count=(len(content) - start) // 4
            )
            self._groups = flat.as_strided(size, (width, 1))
        else:
            self._narrow = self._stored.as_strided(size, (width, 1), pattern.first)
            self._groups = torch.empty(size)
        pitch = self._groups.stride(0)
        offset = self._groups.storage_offset() + pattern.groups // 2 * pitch
        self._segment = self._groups.as_strided((rows, taken), (pattern.groups * pitch, 1), offset)

    def project(self, x: Numbers, products: Numbers, lengths: Numbers | None = None) -> None:
        """Multiply the columns of the bytes that are there now by weights.

        Args:
            x: the weights, ``[taken]``.
            products: gets one of each group, ``[rows, groups]``.
            lengths: gets the norm of the group in the middle of each row, or of the whole row, ``[rows]``.
        """
        import torch

        if self._narrow is not None:
            self._groups.copy_(self._narrow)
        with self._flushing:
            torch.mv(self._groups, torch.from_numpy(x), out=torch.from_numpy(products).view(-1))
            if lengths is not None and self._whole:
                norms = torch.linalg.vector_norm(self._stored, dim=1, dtype=torch.float32)
                torch.from_numpy(lengths).copy_(norms)
            elif lengths is not None:
                torch.linalg.vector_norm(self._segment, dim=1, out=torch.from_numpy(lengths))


class CompiledViews:
    """The same for BF16, by compiled code.

    Args:
        library: the code.
        content: the bytes, ``[rows, columns]``.
        rows: of the tile.
        pattern: which columns; they are halved.
    """

    def __init__(self, library: Library, content: memoryview, rows: int, pattern: Pattern) -> None:
        self._library, self._rows, self._pattern = library, rows, pattern
        self._content = content  # keeps the memory
        self._first = addressof(c_char.from_buffer(content)) + 2 * pattern.first

    def project(self, x: Numbers, products: Numbers, lengths: Numbers | None = None) -> None:
        """Multiply the columns of the bytes that are there now by weights; see `TileViews.project`."""
        pattern = self._pattern
        self._library.project(
            Projected(
                n_rows=self._rows,
                n_groups=pattern.groups,
                pitch=pattern.width,
                taken=pattern.taken,
                values=self._first,
                x=x.ctypes.data,
                products=products.ctypes.data,
                lengths=None if lengths is None else lengths.ctypes.data,
            )
        )


def views_of(
    content: memoryview, rows: int, dtype: str, pattern: Pattern, *, whole: bool
) -> TileViews | CompiledViews:
    """Return views of a buffer; of compiled code, which is quicker, where it can look at them.

    Args:
        content: the bytes, ``[rows, columns]`` of a dtype.
        rows: of the tile; dtype: safetensors code.
        pattern: which columns.
        whole: the norms are those of whole rows.
    """
    found = library()
    if found is None or whole or not pattern.halved:
        return TileViews(content, rows, dtype, pattern, whole=whole)
    return CompiledViews(found, content, rows, pattern)


@lru_cache(maxsize=4)
def _pool(n: int) -> Numbers:
    """Return n pseudo-random weights, the same in every process: signs, with magnitudes from 0.75 to 1.25 (root mean
    square 1.01).
    """
    import numpy as np

    drawn = random.Random(n).random  # noqa: S311 - no secret
    return np.array([(1 if drawn() < 0.5 else -1) * (0.75 + drawn() / 2) for _ in range(n)], np.float32)


def weights_of(name: str, n: int) -> Numbers:
    """Return n pseudo-random weights for a tensor's name, float32, none of them zero. They are a view: do not change them."""
    # Each name takes its own range of one pool, which is made once.
    size = _POOL
    while size < 2 * n:
        size *= 2
    start = zlib.crc32(name.encode()) % (size - n + 1)
    return _pool(size)[start : start + n]


def has_subnormals() -> bool:
    """Return False when this thread already takes subnormal numbers for zero."""
    import torch

    # 2⁻¹⁴⁰ is subnormal in float32.
    return bool(torch.tensor(2.0**-140).mul(0.5))


class Flushing:
    """While in this context, its thread takes subnormal numbers for zero.

    They are slow, and a zero beside another value looks like one. It may be entered again and again.

    Args:
        wanted: do it at all.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted

    def __enter__(self) -> None:
        if self._wanted:
            import torch

            torch.set_flush_denormal(True)

    def __exit__(self, *error: object) -> None:
        if self._wanted:
            import torch

            torch.set_flush_denormal(False)
