"""`lora_merge.rounding.feedback` as torch reads it: cut into panels and blocks of columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.rounding.feedback import PANEL, Feedback, feedback_of, no_feedback

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch  # noqa: TC004 - a field's type, never evaluated

    from lora_merge.rounding.feedback import Columns


class Steps(NamedTuple):
    """How some adjacent columns are decided, in blocks: the columns of a block at the same time."""

    sizes: tuple[int, ...]
    """Columns of each block."""

    pulls: tuple[torch.Tensor, ...]
    """By how much an error shifts the values: q / (λ + q·q) of each column, float32 ``[columns, r]``."""

    pushes: tuple[torch.Tensor, ...]
    """What an error of a value adds to the error of its row: q of each column, float32 ``[r, columns]``."""

    shares: torch.Tensor
    """q·q / (λ + q·q) of all columns, float32 ``[columns, 1]``."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """How all columns of a matrix are decided. Torch and compiled code need different forms of it, which are made when they are
    needed: to cut it into blocks takes longer than all else.
    """

    basis: torch.Tensor
    """Of the adapter's row space, orthonormal, float32 ``[r, in]``."""

    feedback: Feedback

    @cached_property
    def panels(self) -> tuple[Steps, ...]:
        """The columns in their order."""
        assert self.feedback.columns is not None, "nothing is fed back"
        return tuple(_panels(_steps(self.basis, self.feedback.columns), self.feedback.before))

    @cached_property
    def sweeps(self) -> tuple[Steps, ...]:
        """How the columns of the last panel are decided again."""
        last = self.basis[:, self.feedback.before :]
        return tuple(_steps(last, columns) for columns in self.feedback.again)


def schedule_of(basis: torch.Tensor, damping: float) -> Schedule:
    """Return the schedule for a basis.

    Args:
        basis: as `Schedule` has it.
        damping: λ, see `lora_merge.rounding.feedback.damping_for`.
    """
    return Schedule(basis, feedback_of(basis.cpu().numpy(), damping))


def without_feedback(basis: torch.Tensor) -> Schedule:
    """Return the schedule that decides each column alone, see `lora_merge.rounding.feedback.no_feedback`.

    Args:
        basis: as `Schedule` has it.
    """
    return Schedule(basis, no_feedback(basis.cpu().numpy()))


def _steps(basis: torch.Tensor, columns: Columns) -> Steps:
    import torch

    sizes = columns.sizes
    pulls, shares = (torch.from_numpy(part).to(basis.device) for part in (columns.pulls, columns.shares))
    return Steps(sizes, pulls.split_with_sizes(sizes), basis.split_with_sizes(sizes, 1), shares.unsqueeze(1))


def _panels(steps: Steps, before: int) -> Iterator[Steps]:
    """Cut the steps of all columns into panels, the last of which begins at column ``before``."""
    n_columns = sum(steps.sizes)
    block = first = 0
    for end in (*range(PANEL, before + 1, PANEL), n_columns):
        start, at = block, first
        while at < end:
            at += steps.sizes[block]
            block += 1
        part = slice(start, block)
        yield Steps(steps.sizes[part], steps.pulls[part], steps.pushes[part], steps.shares[first:end])
        first = end
