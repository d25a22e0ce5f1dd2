"""Rows of a weight whose deltas see their input alike, and a basis of what they see."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from lora_merge.rounding.basis import row_space
from lora_merge.rounding.feedback import damping_for
from lora_merge.rounding.schedule import schedule_of, without_feedback

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from lora_merge.core.view import View
    from lora_merge.deltas.algebra import Changer, Look  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.rounding.schedule import Schedule  # noqa: TC004 - a field's type, never evaluated

_KEPT = 64
"""Bases that are kept: the next tile mostly needs the same ones."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What some deltas see of their input, for all tiles that they change."""

    looks: tuple[Look, ...]

    schedule: Schedule | None
    """How errors are fed back, with a basis of what is seen; None where their factors are zero."""

    @cached_property
    def gram(self) -> torch.Tensor:
        """A Aᵀ of all looks, one below the other: float64 ``[r, r]``. Only where each is of all inputs."""
        import torch

        a = torch.cat([look.factor for look in self.looks]).double()
        return a @ a.t()


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Some outputs of a weight, and what its deltas see of their input."""

    first: int
    """Outputs, counted through all matrices."""

    last: int

    seen: Seen
    """Its schedule is not None."""

    @property
    def schedule(self) -> Schedule:
        """How errors are fed back."""
        assert self.seen.schedule is not None
        return self.seen.schedule

    @property
    def basis(self) -> torch.Tensor:
        """Float32 ``[r, in]``, orthonormal rows."""
        return self.schedule.basis


class Spans:
    """Finds the spans of a tile. A basis is made once for all tiles that need it.

    Args:
        view: of the weight.
        transposed: whether it is stored ``[in, out]``.
        fed_back: whether errors of rounding are fed back; else they are only summed up.
    """

    def __init__(self, view: View, *, transposed: bool, fed_back: bool) -> None:
        self._fed_back = fed_back
        self._n_inputs, self._n_outputs = (
            (view.rows, view.columns) if transposed else (view.columns, view.rows)
        )
        self._known: OrderedDict[tuple[int, ...], Seen] = OrderedDict()

    def of(self, start: int, end: int, changers: Iterable[Changer]) -> list[Span]:
        """Return the spans among the outputs ``start`` to ``end``, in order, none across two matrices. Outputs that no delta
        changes are in none.
        """
        looks = [
            look
            for changer in changers
            for look in changer.looks()
            if look.outputs[0] < end and look.outputs[1] > start
        ]
        return [
            Span(first, last, seen)
            for first, last, own in _cut(looks, start, end, self._n_outputs)
            if (seen := self._seen(own)).schedule is not None
        ]

    def _seen(self, looks: tuple[Look, ...]) -> Seen:
        """Return what some deltas see. It keeps their factors, so that no other one gets the address of one of theirs."""
        key = tuple(look.factor.data_ptr() for look in looks)
        found = self._known.get(key)
        if found is None:
            basis = row_space([self._whole(look) for look in looks])
            found = self._known[key] = Seen(looks, None if basis is None else self._made(basis))
            while len(self._known) > _KEPT:
                self._known.popitem(last=False)
        return found

    def _made(self, basis: torch.Tensor) -> Schedule:
        return schedule_of(basis, damping_for(*basis.shape)) if self._fed_back else without_feedback(basis)

    def _whole(self, look: Look) -> torch.Tensor:
        """Return A for all inputs: zeros where it has none."""
        n, first = look.factor.shape[1], look.first_input
        if n == self._n_inputs:
            return look.factor
        whole = look.factor.new_zeros(len(look.factor), self._n_inputs)
        whole[:, first : first + n] = look.factor
        return whole


def _cut(
    looks: Sequence[Look], start: int, end: int, n_outputs: int
) -> Iterator[tuple[int, int, tuple[Look, ...]]]:
    """Yield the ranges between ``start`` and ``end`` with one set of looks each, cut where a matrix ends."""
    borders = {start, end, *range(-(-start // n_outputs) * n_outputs, end, n_outputs)}
    borders.update(min(max(edge, start), end) for look in looks for edge in look.outputs)
    for first, last in pairwise(sorted(borders)):
        own = tuple(look for look in looks if look.outputs[0] <= first and look.outputs[1] >= last)
        if own:
            yield first, last, own
