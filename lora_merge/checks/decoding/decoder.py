"""What a decoder is, and what it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.checks.decoding.raw import Raw
    from lora_merge.core.weight import Weight

FLOAT32 = 2.0**-24
"""Unit roundoff of float32."""

UNDERFLOW = 2.0**-146
"""Eight times the smallest subnormal of float32, which a product next to zero may be off by; a factor of six may follow."""


class StoredRows(Protocol):
    """Some rows of a stored weight, part by part: what a `Decoder` reads."""

    @property
    def rows(self) -> Sequence[int]:
        """Their numbers."""

    @property
    def n_rows(self) -> int:
        """The number of rows that the whole weight is divided into."""

    @property
    def weight(self) -> Weight:
        """The weight: shape, storage, parts."""

    def share(self, role: str) -> torch.Tensor:
        """Return the rows of a part that is divided as the weight is, float64, one row each."""

    def whole(self, role: str) -> torch.Tensor:
        """Return a whole part, float64, one-dimensional."""

    def part(self, role: str, rows: Sequence[int], n_rows: int, within: tuple[int, int] | None = None) -> Raw:
        """Return the bytes of any rows of a part.

        Args:
            role: the part.
            rows: their numbers.
            n_rows: that the part is divided into, whatever its shape.
            within: the first byte of each row that is wanted, and the one after the last; default: all of them.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """Stored values, taken apart: each is ``(level - zero) · scale + bias``, with a level out of a table.

    Shapes:
        level: float64 ``[len(rows), columns]``; scale, zero, bias: the same, or broadcast to it; table: float64 ``[n]``.
    """

    level: torch.Tensor

    table: torch.Tensor | None = None
    """Every level that a code can stand for, in order; None for plain numbers, which are what their dtype has."""

    scale: torch.Tensor | float = 1.0
    zero: torch.Tensor | float = 0.0
    bias: torch.Tensor | float = 0.0

    @property
    def values(self) -> torch.Tensor:
        """What is stored, float64 ``[len(rows), columns]``."""
        return self.meant(self.level)

    def meant(self, level: torch.Tensor) -> torch.Tensor:
        """Return the values that levels stand for."""
        # Most storages have no zero points and no biases, and a pass over all values takes time.
        if not isinstance(self.zero, float) or self.zero:
            level = level - self.zero
        found = level * self.scale
        return found + self.bias if not isinstance(self.bias, float) or self.bias else found

    def numbers(self, values: torch.Tensor) -> torch.Tensor:
        """Return where values are among the levels: the inverse of `meant`."""
        if not isinstance(self.bias, float) or self.bias:
            values = values - self.bias
        found = values / self.scale
        return found + self.zero if not isinstance(self.zero, float) or self.zero else found

    def at(self, places: tuple[torch.Tensor, ...]) -> Levels:
        """Return some of the values: their rows, and their columns."""
        level, scale, zero, bias = (part[places] for part in self.parts)
        return Levels(level, self.table, scale, zero, bias)

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Level, scale, zero and bias, all as large as the first."""
        import torch

        others = (torch.as_tensor(part).double() for part in (self.scale, self.zero, self.bias))
        return self.level, *(part.expand_as(self.level) for part in others)

    def split(self, lines: Lines, stored: StoredRows) -> Levels:
        """Return levels of lines as levels of the rows that the weight is divided into."""
        if lines.count == stored.n_rows:
            return self
        scale, zero, bias = (
            part if isinstance(part, float) else lines.as_rows(part.expand_as(self.level), stored)
            for part in (self.scale, self.zero, self.bias)
        )
        return Levels(lines.as_rows(self.level, stored), self.table, scale, zero, bias)

    @classmethod
    def joined(cls, several: Sequence[Levels]) -> Levels:
        """Return rows one after the other."""
        import torch

        level, scale, zero, bias = (
            torch.cat(list(part)) for part in zip(*(one.parts for one in several), strict=True)
        )
        return cls(level, several[0].table, scale, zero, bias)


def integers(first: int, last: int) -> torch.Tensor:
    """Return the table of whole numbers from ``first`` to ``last``."""
    import torch

    return torch.arange(first, last + 1, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Decoder:
    """How stored values are decoded."""

    levels: Callable[[StoredRows], Levels]

    slack: Callable[[StoredRows, torch.Tensor], torch.Tensor] | None = None
    """How far float32 may be from the values, when it decodes them; None where it makes no error."""

    is_across: bool = False
    """True where rows of the weight lie across those of its parts: to read one takes about as long as to read many."""


def products(n: int) -> Callable[[StoredRows, torch.Tensor], torch.Tensor]:
    """Return the error of ``n`` float32 products in a row: each is off by 2⁻²⁴ of itself at most, plus underflow."""
    return lambda _, values: values.abs().mul_(n * FLOAT32).add_(n * UNDERFLOW)


def setting(stored: StoredRows, name: str) -> int:
    """Return a setting of the storage that is a number."""
    return int(dict(stored.weight.storage.settings)[name])


def text(stored: StoredRows, name: str) -> str:
    """Return a setting of the storage that is a word."""
    return str(dict(stored.weight.storage.settings)[name])


@dataclass(frozen=True, slots=True)
class Lines:
    """Some rows of a weight as rows of its matrices, counted through all of them.

    A row of a stack may be a whole matrix, so it may have many lines.
    """

    numbers: Sequence[int]
    height: int
    """Rows of one matrix."""

    width: int
    n_matrices: int

    @property
    def count(self) -> int:
        """The number of lines of the whole weight."""
        return self.n_matrices * self.height

    @classmethod
    def of(cls, stored: StoredRows) -> Lines:
        """Return the lines of the rows that are wanted."""
        *outer, height, width = stored.weight.shape
        count = prod(outer) * height
        each = count // stored.n_rows
        # As they are, since a range of rows is read in one go.
        if each == 1:
            return cls(stored.rows, height, width, prod(outer))
        return cls([row * each + n for row in stored.rows for n in range(each)], height, width, prod(outer))

    def as_rows(self, values: torch.Tensor, stored: StoredRows) -> torch.Tensor:
        """Return values of the lines as values of the rows: ``[len(rows), columns]``."""
        return values.reshape(len(stored.rows), -1)


def gathered(stored: StoredRows, role: str, numbers: Sequence[int], n_rows: int) -> tuple[Raw, Sequence[int]]:
    """Return rows of a part, each read once however often it is wanted, and where each wanted row is among them."""
    distinct = sorted(set(numbers))
    place = {number: n for n, number in enumerate(distinct)}
    return stored.part(role, distinct, n_rows), [place[number] for number in numbers]
