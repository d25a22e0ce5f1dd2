"""A parameter of a model, and the tensors that store it: one, or several in a quantised storage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lora_merge.core.tensor import TORCH_NAMES, TensorRef

DENSE = "dense"
"""The codec of plain tensors, whose one part has the role `WEIGHT`."""

WEIGHT = "weight"

Setting = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Storage:
    """How a parameter is stored."""

    codec: str
    """A key of `lora_merge.codecs.CODECS`."""

    dtype: str
    """Of the main part: a safetensors code, such as ``"BF16"``."""

    settings: tuple[tuple[str, Setting], ...] = ()
    """Of the codec: the shape of its blocks, the size of its groups."""

    @property
    def is_dense(self) -> bool:
        """True where one tensor holds the values as they are."""
        return self.codec == DENSE

    @property
    def value_dtype(self) -> str:
        """Dtype that single values are rounded to. A codec with scales rounds them from float32, in groups."""
        return self.dtype if self.is_dense else "F32"


FLOAT32 = Storage(DENSE, "F32")
"""Plain float32, in which all arithmetic is done."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter: its name and shape as the model has them, and the tensors that store it."""

    name: str
    shape: tuple[int, ...]
    storage: Storage

    parts: Mapping[str, TensorRef] = field(hash=False)
    """Role → stored tensor; of a dense one ``{"weight": …}``."""

    @classmethod
    def dense(cls, ref: TensorRef) -> Weight:
        """Return a stored tensor as the parameter with the same name, with one part."""
        return cls(ref.name, ref.shape, Storage(DENSE, ref.dtype), {WEIGHT: ref})

    @property
    def plain(self) -> TensorRef | None:
        """The tensor that holds the values as they are; None where a codec has to decode them."""
        return self.parts[WEIGHT] if self.storage.is_dense else None

    @property
    def dtype(self) -> str:
        """Dtype of the main part, a safetensors code."""
        return self.storage.dtype

    @property
    def holds_floats(self) -> bool:
        """True where the values are floating-point numbers. A codec's always are; integers without a codec never are."""
        return not self.storage.is_dense or self.storage.dtype in TORCH_NAMES

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(ref.nbytes for ref in self.parts.values())

    @property
    def files(self) -> frozenset[str]:
        """The files that the parts are in; a weight's parts may be in different shards."""
        return frozenset(ref.file for ref in self.parts.values())


Survey = Literal["none", "tensor"]
"""How much of a weight a codec has to see before it encodes the first row: nothing, or all values (to set a scale)."""


# One of the next two is made for each tile: a named tuple in a fifth of the time that a frozen dataclass takes.


class Tile(NamedTuple):
    """Some rows of a weight, which is looked at as a matrix.

    A row is what one entry of the view's rows holds: of a weight ``[experts, out, in]`` either ``out · in`` values or, where
    the experts are stacked, ``in``.
    """

    shape: tuple[int, ...]
    """Of the whole weight."""

    n_rows: int
    """That the whole weight is divided into."""

    start: int
    end: int


class PartRange(NamedTuple):
    """The share of one part that belongs to a tile."""

    dtype: str

    shape: tuple[int, ...]
    """In which the codec is given it."""

    ranges: tuple[tuple[int, int], ...]
    """``(first byte, bytes)`` in the part, in the order of the shape; several where the part is stored transposed."""

    @property
    def nbytes(self) -> int:
        """Bytes of all ranges."""
        return sum(nbytes for _, nbytes in self.ranges)
