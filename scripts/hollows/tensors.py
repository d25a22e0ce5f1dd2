"""Safetensors files written by hand: with holes for data, which take no room on a disk, or with random values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

CHUNK_BYTES = 64 * 2**20
"""Of random values, made at a time."""

ITEM_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4, "U8": 1}
"""By dtype as safetensors names it."""


class Stored(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of its values."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Piece = bytes | memoryview
Fill = Callable[[Stored], Iterable[Piece]]
"""The bytes of a tensor, in pieces; what is missing at the end is a hole."""


def hole(_: Stored) -> Iterable[Piece]:
    """Return nothing: the tensor reads as zeros, and takes no room."""
    return ()


def write(path: Path, tensors: Iterable[Stored], fill: Fill = hole) -> int:
    """Write a file of tensors in their order; return the bytes of their data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = [], 0
    for tensor in tensors:
        begins.append((tensor, end))
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, begin in begins:
            for n, part in enumerate(fill(tensor)):
                if not n:
                    file.seek(8 + len(text) + begin)
                file.write(part)
        file.truncate(8 + len(text) + end)
    return end


def random_values(tensor: Stored) -> Iterator[Piece]:
    """Yield random values of a weight, a chunk at a time: codes that are numbers, small positive scales, weights of about 0.02.

    Norms and biases of one axis are ones. Seeds are torch's.
    """
    left = math.prod(tensor.shape)
    while left:
        part = min(left, CHUNK_BYTES // ITEM_BYTES[tensor.dtype])
        yield _drawn(tensor, part)
        left -= part


def _drawn(tensor: Stored, n: int) -> Piece:
    import torch

    match tensor.dtype:
        case "F8_E4M3":
            codes = torch.randint(0, 254, (n,), dtype=torch.uint8)
            values = codes + (codes >= 0x7F)  # 0x7f and 0xff are no numbers
        case "F32":
            values = torch.rand(n).add_(0.5).mul_(1e-4)
        case "I32":  # words of eight codes
            values = torch.randint(-(2**31), 2**31, (n,), dtype=torch.int32)
        case "U8" if tensor.name.endswith("_scales"):  # powers of two: 2⁻⁸ to 2⁻⁶
            values = torch.randint(119, 122, (n,), dtype=torch.uint8)
        case "U8":
            values = torch.randint(0, 256, (n,), dtype=torch.uint8)
        case _ if tensor.name.endswith("_scale"):
            values = (torch.rand(n) + 0.5).mul_(0.004).bfloat16()
        case _ if len(tensor.shape) < 2:
            values = torch.ones(n, dtype=torch.bfloat16)
        case _:
            values = (torch.randn(n) * 0.02).bfloat16()
    filled: Piece = values.view(torch.uint8).numpy().data
    return filled
