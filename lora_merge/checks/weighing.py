"""Bytes of a row tile as matrices that are multiplied by weights at the speed of memory.

Two neighbouring bfloat16 values, read as one float32, are the second of them: the first fills the lower half of its
mantissa, which is less than one unit in the last place of bfloat16. So nothing need be widened: from a tile's first byte on
one sees its odd columns, from its third byte on its even ones. Nothing here shares memory with what the merge made of them.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_merge.core.tensor import TORCH_NAMES

if TYPE_CHECKING:
    import torch

GROUP = 128
"""Columns that make one product, about: a row has as many products as it has groups."""

SEGMENT = 128
"""Columns that the length of a row is taken from."""

_POOL = 1 << 15


class TileViews:
    """What a tile's bytes are multiplied through; made once for a buffer, and good for whatever is in it.

    Args:
        content: the bytes, ``[rows, columns]`` of a dtype.
        rows, columns: of the tile; dtype: safetensors code.
        halved: odd and even columns apart, as `is_halved` allows it; width: columns of a group.

    Shapes:
        odd: float32 ``[rows, n]``: the odd columns where halved, else all; `refresh` widens what is no float32.
        groups: ``[rows · n / width, width]``, the same.
        even: float32 ``[rows, m]``: the even columns but the first, where halved; else None.
        first: ``[rows]``: the first column.
    """

    def __init__(
        self, content: memoryview, rows: int, columns: int, dtype: str, *, halved: bool, width: int
    ) -> None:
        import torch

        self._stored = torch.frombuffer(content, dtype=getattr(torch, TORCH_NAMES[dtype])).view(rows, columns)
        self._is_wide = dtype == "F32" or halved
        self.first = self._stored[:, 0]
        self.even: torch.Tensor | None = None
        if halved:
            half = columns // 2
            self.odd = torch.frombuffer(content, dtype=torch.float32).view(rows, half)
            # one value less than there are: it would end beyond the tile
            shifted = torch.frombuffer(content, dtype=torch.float32, offset=2, count=rows * half - 1)
            self.even = shifted.as_strided((rows, half - 1), (half, 1))
        elif dtype == "F32":
            self.odd = self._stored
        else:
            self.odd = torch.empty(rows, columns)
        self.groups = self.odd.view(-1, width)
        start = max((self.odd.shape[1] - SEGMENT) // 2, 0)
        self.segment = self.odd[:, start : start + SEGMENT]

    def refresh(self) -> None:
        """Widen what is in the bytes now, where that is needed."""
        if not self._is_wide:
            self.odd.copy_(self._stored)


def is_halved(columns: int, *dtypes: str) -> bool:
    """Return True where two BF16 values can be read as one float32: the second, and a bit of the first."""
    return set(dtypes) == {"BF16"} and columns % 2 == 0 and columns >= 4


def n_groups(n: int) -> int:
    """Return in how many groups of equal size n columns are multiplied."""
    return next((k for k in range(max(n // GROUP, 1), 1, -1) if n % k == 0), 1)


@lru_cache(maxsize=4)
def _pool(n: int) -> torch.Tensor:
    """Return random weights, always the same: signs with magnitudes from 0.75 to 1.25 (root mean square 1.01)."""
    import torch

    generator = torch.Generator().manual_seed(n)
    signs = torch.randint(2, (n,), generator=generator).mul_(2).sub_(1)
    return signs * torch.rand(n, generator=generator).mul_(0.5).add_(0.75)


def weights_of(name: str, n: int) -> torch.Tensor:
    """Return n random weights for a name, none of them zero; they are not to be changed."""
    size = _POOL
    while size < 2 * n:
        size *= 2
    start = zlib.crc32(name.encode()) % (size - n + 1)
    return _pool(size)[start : start + n]


def has_subnormals() -> bool:
    """Return True unless the program takes subnormal numbers for zero in this thread already."""
    import torch

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
