"""Lattices: the numbers that one code can stand for, before any scale. They are called *levels*, and are kept in float32."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import inf, isfinite
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_SIGN = -(2**31)
"""The sign of a float32, as an int32."""

_EXPONENT = 0x7F800000
"""The exponent of a float32, as an int32."""

_CACHED = 1 << 18
"""Numbers that are rounded at a time."""


class Lattice(Protocol):
    """Some numbers, in order. Beyond the last there are none: what lies there becomes the last (it *saturates*)."""

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest level and the largest."""

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Turn float32 numbers into the nearest levels, in place, and return them. A level stays what it is, and so does
        the sign of a zero. Ties go where the storage's own library has them.
        """

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the levels next to float32 numbers: the largest that is not above, the smallest that is above it.
        Beyond an end both are the end.
        """


@dataclass(frozen=True, slots=True)
class Integers:
    """Whole numbers from ``first`` to ``last``; ties to even."""

    first: int
    last: int

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last."""
        return float(self.first), float(self.last)

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Round half to even, then cut off what is beyond an end."""
        return numbers.round_().clamp_(self.first, self.last)

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the whole numbers below and above."""
        below = numbers.floor()
        return below.clamp(self.first, self.last), below.add(1).clamp_(self.first, self.last)


@dataclass(frozen=True, slots=True)
class Floats:
    """Floating-point numbers of a few bits; ties to even.

    All of them are exact in float32, whose own rounding does the work: added to a number whose last bit has the size of the
    wanted spacing, a float32 is rounded to that spacing.
    """

    mantissa_bits: int
    """Stored ones: 3 of E4M3."""

    smallest: int
    """Exponent of the smallest normal number, below which the spacing stays the same."""

    largest: float

    @property
    def ends(self) -> tuple[float, float]:
        """The largest number, of either sign."""
        return -self.largest, self.largest

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Round half to even at the spacing that a number's exponent has."""
        # Parts whose copies fit into the cache take half of the time, or a tenth where the system maps fresh memory.
        for part in _parts(numbers):
            self._round_(part)
        return numbers

    def _round_(self, numbers: torch.Tensor) -> None:
        import torch

        numbers.clamp_(-self.largest, self.largest)
        rounded, power = torch.empty_like(numbers), torch.empty_like(numbers)
        self.unsigned(numbers, rounded, power)
        # On integers it takes a tenth of the time of `copysign`, which guesses signs.
        numbers.view(torch.int32).bitwise_and_(_SIGN).bitwise_or_(rounded.view(torch.int32))

    def unsigned(self, numbers: torch.Tensor, out: torch.Tensor, power: torch.Tensor) -> None:
        """Write the levels nearest to numbers that are not beyond an end. Zeros have no sign: see `sign_zeros_`.

        Args:
            numbers: float32; they stay as they are.
            out: for the levels; power: space. Both have the shape of the numbers, and share no memory.
        """
        import torch

        torch.bitwise_and(numbers.view(torch.int32), _EXPONENT, out=power.view(torch.int32))
        power.clamp_(min=2.0**self.smallest)
        # 1.5 · 2^23 · spacing: its last bit is one spacing, and a sum with the number stays in its binade. Both products are exact.
        big = 1.5 * 2.0 ** (23 - self.mantissa_bits)
        torch.add(numbers, power, alpha=big, out=out)
        out.sub_(power, alpha=big)

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the numbers below and above."""
        import torch

        size = numbers.abs().clamp_(max=self.largest)
        smaller, larger = self._around(size)
        # A negative level has its neighbour on the side of zero, where the spacing may be half as wide.
        nearer, _ = self._around(size.nextafter(torch.zeros_like(size)))
        is_level = (smaller == size) & (size > 0) & (numbers >= -self.largest)
        above = torch.where(numbers < 0, nearer.where(is_level, smaller).neg_(), larger)
        below = torch.where(numbers < 0, larger.where(smaller != size, smaller).neg_(), smaller)
        return below, above

    def _around(self, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the levels around sizes: the largest that is not larger, and the next one, up to the end."""
        spacing = self._power(size).mul_(2.0**-self.mantissa_bits)
        smaller = size.div(spacing).floor_().mul_(spacing)
        return smaller, smaller.add(spacing).clamp_(max=self.largest)

    def _power(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the power of two below each number's size, the smallest normal one at least."""
        import torch

        power = numbers.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
        return power.clamp_(min=2.0**self.smallest)


@dataclass(frozen=True, slots=True)
class FloatsAway(Floats):
    """The same numbers; ties away from zero."""

    def _round_(self, numbers: torch.Tensor) -> None:
        import torch

        numbers.clamp_(-self.largest, self.largest)
        spacing = self._power(numbers).mul_(2.0**-self.mantissa_bits)
        # In whole halves of the spacing, each number of them rounded up to an even one: exact, where a sum with 0.5 is not.
        rounded = numbers.abs().div_(spacing).mul_(2).floor_().add_(1).mul_(0.5).floor_().mul_(spacing)
        numbers.view(torch.int32).bitwise_and_(_SIGN).bitwise_or_(rounded.view(torch.int32))


def sign_zeros_(levels: torch.Tensor, numbers: torch.Tensor) -> None:
    """Give zeros without a sign that of the numbers they are rounded from. The numbers are lost.

    Args:
        levels: float32, the nearest to the numbers; they are changed.
        numbers: float32, in the same shape.
    """
    import torch

    levels.view(torch.int32).bitwise_or_(numbers.view(torch.int32).bitwise_and_(_SIGN))


def _parts(numbers: torch.Tensor) -> Sequence[torch.Tensor]:
    import torch

    return torch.split(numbers.view(-1), _CACHED) if numbers.is_contiguous() else (numbers,)


@dataclass(frozen=True, slots=True)
class Plain(Floats):
    """The numbers of a dtype that torch converts to, beyond whose largest is infinity."""

    dtype: str
    """As torch spells it."""

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Convert there and back."""
        import torch

        return numbers.copy_(numbers.to(getattr(torch, self.dtype)))


@dataclass(frozen=True, slots=True)
class Table:
    """Any numbers, in order and each of them once; ties go down."""

    levels: tuple[float, ...]
    """Exact in float32, finite."""

    @classmethod
    def of(cls, values: torch.Tensor) -> Table:
        """Return the lattice of a stored table. Numbers that are not finite belong to none."""
        return cls(tuple(sorted({value for value in values.tolist() if isfinite(value)})) or (0.0,))

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last."""
        return self.levels[0], self.levels[-1]

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Look up the levels of the intervals that numbers are in. Of two zeros there is one."""
        import torch

        if not numbers.is_contiguous():
            return numbers.copy_(self.nearest_(numbers.contiguous()))
        levels, intervals = _tensor(self.levels, numbers.device), _between(self.levels, numbers.device)
        for piece in torch.split(numbers.view(-1), _PIECE):
            torch.index_select(levels, 0, intervals.of(piece), out=piece)
        return numbers

    def neighbours(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the levels below and above."""
        levels, last = _tensor(self.levels, numbers.device), len(self.levels) - 1
        # Each interval ends just below a level, so its number is that of the next level above.
        above = _below(self.levels, numbers.device).of(numbers.reshape(-1))
        below = (above - 1).clamp_(min=0)
        low, high = (levels.index_select(0, at.clamp_(max=last)) for at in (below, above))
        return low.view(numbers.shape), high.view(numbers.shape)

    def positions(self, levels: torch.Tensor) -> torch.Tensor:
        """Return where levels are in the order of all: int32 ``[n]``.

        Args:
            levels: float32 ``[n]``, each one of the table.
        """
        import torch

        n_bins, position = _places(self.levels, levels.device)
        if not n_bins:
            return _between(self.levels, levels.device).of(levels)
        found = torch.empty(levels.shape, dtype=torch.int32, device=levels.device)
        for piece, out in zip(torch.split(levels, _PIECE), torch.split(found, _PIECE), strict=True):
            torch.index_select(position, 0, _bins(piece, self.ends, n_bins), out=out)
        return found


_PIECE = 1 << 17
"""Numbers that are looked up at once. Memory for several times as many is taken from the system and given back each time."""


class _Intervals(NamedTuple):
    """Borders between intervals, found by bins of the same width that have one border at most."""

    borders: torch.Tensor
    """The largest float32 of each interval but the last."""

    start: float
    end: float

    first: torch.Tensor
    """Int32: the interval that each bin begins in."""

    border: torch.Tensor
    """Float32: the border in each bin, infinite in those without one."""

    n_bins: int
    """0 where borders are too near to each other."""

    def of(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the interval of each number, int32 ``[n]``."""
        import torch

        if not self.n_bins:
            return torch.bucketize(numbers, self.borders, out_int32=True)
        bins = _bins(numbers, (self.start, self.end), self.n_bins)
        found = self.first.index_select(0, bins)
        return found.add_(numbers > self.border.index_select(0, bins))


def _bins(numbers: torch.Tensor, ends: tuple[float, float], n_bins: int) -> torch.Tensor:
    """Return the bin of each number, int32. A larger number is in no lower bin, so that borders are never misplaced."""
    import torch

    start, end = ends
    bins = numbers.clamp(start, end).sub_(start).mul_((n_bins - 1) / (end - start)).to(torch.int32)
    # NaN may be any integer.
    return bins.clamp_(0, n_bins - 1)


_N_BINS = tuple(1 << n for n in range(5, 15))
"""How many are tried. The tables of more would not fit into the processor's cache."""


@lru_cache(64)
def _tensor(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor(values, dtype=torch.float32, device=device)


@lru_cache(64)
def _between(levels: tuple[float, ...], device: torch.device) -> _Intervals:
    """Return the intervals that end in the middle between two levels."""
    import torch

    exact = torch.tensor(levels, dtype=torch.float64)
    exact = (exact[:-1] + exact[1:]) / 2
    borders = exact.float()
    # The largest float32 that is not above the middle, so that ties go down.
    return _intervals(borders.where(borders <= exact, _just_below(borders)), levels, device)


@lru_cache(64)
def _below(levels: tuple[float, ...], device: torch.device) -> _Intervals:
    """Return the intervals that end just below each level."""
    import torch

    return _intervals(_just_below(torch.tensor(levels)), levels, device)


def _just_below(numbers: torch.Tensor) -> torch.Tensor:
    import torch

    return numbers.nextafter(torch.tensor(-inf))


def _intervals(borders: torch.Tensor, levels: tuple[float, ...], device: torch.device) -> _Intervals:
    """Return the intervals that have some borders, which lie about between the first level and the last."""
    import torch

    ends = levels[0], levels[-1]
    n_bins = _enough(borders, ends)
    if not n_bins:
        nothing = torch.empty(0, device=device)
        return _Intervals(borders.to(device), *ends, nothing, nothing, 0)
    bins = _bins(borders, ends, n_bins)
    first = (torch.arange(n_bins)[:, None] > bins).sum(1, dtype=torch.int32)
    border = torch.full((n_bins,), inf).index_copy_(0, bins.long(), borders)
    return _Intervals(borders.to(device), *ends, first.to(device), border.to(device), n_bins)


@lru_cache(64)
def _places(levels: tuple[float, ...], device: torch.device) -> tuple[int, torch.Tensor]:
    """Return a number of bins that have one level at most, and int32: the place of each bin's level in their order."""
    import torch

    found, ends = torch.tensor(levels, dtype=torch.float32), (levels[0], levels[-1])
    n_bins = _enough(found, ends)
    position = torch.zeros(n_bins, dtype=torch.int32)
    if n_bins:
        position[_bins(found, ends, n_bins).long()] = torch.arange(len(levels), dtype=torch.int32)
    return n_bins, position.to(device)


def _enough(numbers: torch.Tensor, ends: tuple[float, float]) -> int:
    """Return how many bins keep some numbers apart; 0 where none of `_N_BINS` does."""
    if ends[0] == ends[1]:
        return 0
    return next((n for n in _N_BINS if len(set(_bins(numbers, ends, n).tolist())) == len(numbers)), 0)


E4M3 = Floats(3, -6, 448.0)
E5M2 = Floats(2, -14, 57344.0)
E2M1 = Floats(1, 0, 6.0)
E2M1_AWAY = FloatsAway(1, 0, 6.0)

PLAIN = {
    "BF16": Plain(7, -126, (2 - 2.0**-7) * 2.0**127, "bfloat16"),
    "F16": Plain(10, -14, 65504.0, "float16"),
    "F32": Plain(23, -126, (2 - 2.0**-23) * 2.0**127, "float32"),
}
"""The lattices of plain tensors, by safetensors code."""
