"""The numbers that a tile's values can become, once its scales are fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.codecs.geometry import in_groups

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.codecs.lattice import Lattice  # noqa: TC004 - a field's type, never evaluated


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Where compiled code may store codes at once, in place of levels: lines of bytes, one code behind the other.

    Shapes:
        out, stored: U8 ``[lines, bytes]``, contiguous.
    """

    out: torch.Tensor
    bits: int
    """Of a code, 4 or 8; the low ones of a byte first."""

    offset: int = 0
    """What is added to a whole number, whose lower bits are its code."""

    stored: torch.Tensor | None = None
    """The codes before, on a stored grid."""

    keeps_signs: bool = False
    """True where a zero that stays one keeps its sign; False where there is one zero."""

    levels: torch.Tensor | None = None
    """The level of each code, float32 ``[2^bits]``, where compiled code may read the values from what is stored."""

    @classmethod
    def of(
        cls,
        out: torch.Tensor,
        bits: int,
        *,
        offset: int = 0,
        stored: torch.Tensor | None = None,
        keeps_signs: bool = False,
        levels: torch.Tensor | None = None,
    ) -> Codes | None:
        """Return the place of codes that are stored as bytes or words ``[lines, …]``; None if they are not in one piece."""
        import torch

        parts = [part for part in (out, stored) if part is not None]
        if not all(part.is_contiguous() and part.dim() == 2 and part.numel() for part in parts):
            return None
        seen = [part.view(torch.uint8) for part in parts]
        return cls(seen[0], bits, offset, seen[1] if stored is not None else None, keeps_signs, levels)


class Packed(NamedTuple):
    """Codes that are stored: what there is in place of levels."""

    total: torch.Tensor
    """A norm of all values' errors, float64: not finite where one of the values is not."""


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The grid of a tile: a level (`Lattice`) stands for ``(level - zero) · scale + bias``, in float32.

    A tile is seen as lines of ``in`` values (`lora_merge.codecs.geometry.Lines`). Which of the levels a value becomes is
    for the rounding to choose; `keep` stores its choice.

    Shapes:
        scale, zero, bias: float32 ``[lines, groups]``; None for 1, 0 and 0. A scale is never 0: where the stored one is, it
        is 2^-126 here, and `keep` leaves the stored codes of that group as they are.
    """

    lattice: Lattice

    keep: Callable[[torch.Tensor], object]
    """Stores levels, float32 ``[lines, in]``, each one of the lattice: packs their codes into the parts of the tile. It may
    change the levels that it is given.
    """

    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    group: int | torch.Tensor = 0
    """Adjacent values of a group, the last of a line may be cut off; 0 for the whole line; or int32 ``[in]``: the group of
    each column.
    """

    place: torch.Tensor | None = None
    """Where levels may be written at once: what is stored of a plain tensor are the levels themselves."""

    quotient: Callable[[torch.Tensor], torch.Tensor] | None = None
    """What a library that quantises rounds to the nearest level in place of ``(value - bias) / scale + zero`` in float32: its
    own arithmetic, in bfloat16 for example. Float32 ``[lines, in]`` → the same, newly allocated.
    """

    codes: Codes | None = None
    """Where codes may be stored without `keep`. None where that is not all that `keep` does."""

    def of_lines(self, first: int, last: int) -> Grid:
        """Return the grid of some of the lines, without a `keep`."""

        def cut(part: torch.Tensor | None) -> torch.Tensor | None:
            return None if part is None else part[first:last]

        # The library's arithmetic is for whole tiles.
        return replace(
            self,
            keep=_not_kept,
            scale=cut(self.scale),
            zero=cut(self.zero),
            bias=cut(self.bias),
            place=cut(self.place),
            quotient=None,
            codes=None,
        )

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the level that is nearest to each value, in new memory.

        Shapes:
            values: float32 ``[lines, in]``.
        """
        numbers = self.numbers(values) if self.quotient is None else self.quotient(values)
        return self.lattice.nearest_(numbers)

    def numbers(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``(value - bias) / scale + zero``: where each value lies between the levels. New memory."""
        found = values.clone()
        for part, columns in self._grouped(found):
            if self.bias is not None:
                part.sub_(self._of(self.bias, columns))
            if self.scale is not None:
                part.div_(self._of(self.scale, columns))
            if self.zero is not None:
                part.add_(self._of(self.zero, columns))
        return found

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        """Return what levels stand for, float32 ``[lines, in]``, in new memory."""
        found = levels.clone()
        for part, columns in self._grouped(found):
            if self.zero is not None:
                part.sub_(self._of(self.zero, columns))
            if self.scale is not None:
                part.mul_(self._of(self.scale, columns))
            if self.bias is not None:
                part.add_(self._of(self.bias, columns))
        return found

    def _grouped(self, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, slice | torch.Tensor]]:
        if isinstance(self.group, int):
            yield from in_groups(values, self.group)
        else:
            yield values.unsqueeze(1), self.group

    def _of(self, found: torch.Tensor, columns: slice | torch.Tensor) -> torch.Tensor:
        if isinstance(columns, slice):
            return found[:, columns, None]
        return found.index_select(1, columns).unsqueeze(1)


def _not_kept(levels: torch.Tensor) -> None:
    """Refuse levels: only those of a whole tile are stored."""
    raise AssertionError(f"{len(levels)} lines of a larger tile are not stored alone")
