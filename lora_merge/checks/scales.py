"""Are new scales right? The largest value of each block is recomputed, and what its scale must be follows from it.

Of a value x, float32 had something from x - e to x + e (`lora_merge.checks.formulas` says what e is). So the largest value that it had in
a block is between the largest x - e and the largest x + e. `lora_merge.checks.new_scales` says which scales these two limits allow.

A block is compared when all of its rows have been recomputed, whichever come together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from lora_merge.checks.new_scales import GLOBAL, SCALE, ZERO, rule_of, zeros_explained
from lora_merge.checks.rounding import LARGEST, rounded
from lora_merge.core.report import error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from lora_merge.checks.decoding import Levels
    from lora_merge.checks.formulas import Value
    from lora_merge.checks.new_scales import Rule
    from lora_merge.checks.reading import Reader
    from lora_merge.core.plan import Merge
    from lora_merge.core.report import Issue
    from lora_merge.core.weight import Weight


class _Blocks(NamedTuple):
    """Some rows of blocks, and what they are compared by.

    Shapes:
        numbers: ``[n]``, through all matrices; tops: as `_tops` returns them, with zero points or else one side, the larger one;
        scale, zero: ``[n, groups]``.
    """

    numbers: torch.Tensor
    tops: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


@dataclass(slots=True)
class _Tally:
    """What was compared of one part, and the first entry that is wrong."""

    what: str
    """An entry, for people."""

    n_compared: int = 0
    n_wrong: int = 0
    first: str = ""

    def issues(self, name: str) -> Iterator[Issue]:
        """Yield an issue if an entry is wrong.

        Args:
            name: of the part.
        """
        if self.n_wrong:
            more = f"; {self.n_wrong} of {self.n_compared} checked {self.what}s are wrong"
            yield error("wrong-scale", name, self.first + (more if self.n_wrong > 1 else ""))


class Scales:
    """The new scales of one merged weight.

    Args:
        weight: as it is in the output.
        rule: how its scales are made.
        overall: the stored scale of the whole tensor, float64 ``[1]``, where there is one.
    """

    def __init__(self, weight: Weight, rule: Rule, overall: torch.Tensor | None) -> None:
        self._weight, self._rule, self._overall = weight, rule, overall
        *stack, self._height, self._width = weight.shape
        self._n_lines, self._n_seen = prod(stack) * self._height, 0
        self._high = -(-self._height // rule.rows)
        self._begun: dict[int, tuple[int, torch.Tensor]] = {}
        self._tallies = {SCALE: _Tally("scale"), ZERO: _Tally("zero point")}
        self._largest: torch.Tensor | None = None

    @classmethod
    def of(cls, op: Merge, weight: Weight, reader: Reader) -> Scales | None:
        """Return the scales of a merged weight; None where the merge made none.

        Args:
            op: what was done.
            weight: as it is in the output.
            reader: of all files.
        """
        if op.on_stored_grid:
            return None
        overall = reader.whole(weight.parts[GLOBAL]) if GLOBAL in weight.parts else None
        rule = rule_of(op, overall)
        return cls(weight, rule, overall) if rule else None

    @property
    def largest(self) -> torch.Tensor | None:
        """The limits of the largest magnitude of the weight, float64 ``[2]``; None where not all rows have been recomputed."""
        return self._largest if self._n_seen == self._n_lines else None

    def add(self, rows: Sequence[int], stored: Levels, candidates: Sequence[Value]) -> None:
        """Compare the scales of blocks that are complete with some rows.

        Args:
            rows: their numbers.
            stored: what is in the output.
            candidates: what each value may be, and how far off float32 may be.
        """
        import torch

        # A row of a stack may be a whole matrix, which has many lines.
        each = stored.level.numel() // len(rows) // self._width
        lines = torch.tensor(rows)[:, None].mul(each).add(torch.arange(each)).flatten()
        self._n_seen += len(lines)
        scale = self._of_groups(stored, stored.scale)
        zero = self._of_groups(stored, stored.zero) if self._rule.has_zeros else scale
        tops = _tops(candidates, self._width, self._rule.columns or self._width)
        blocks = _Blocks(lines, tops if self._rule.has_zeros else tops.amax(1, keepdim=True), scale, zero)
        for complete in [blocks] if self._rule.rows == 1 else self._completed(blocks):
            self._compare(complete)

    def issues(self) -> Iterator[Issue]:
        """Yield an issue for each part with an entry that is wrong."""
        for role, tally in self._tallies.items():
            if tally.n_wrong:
                yield from tally.issues(self._weight.parts[role].name)

    def _of_groups(self, stored: Levels, part: torch.Tensor | float) -> torch.Tensor:
        """Return the entry of each group, ``[lines, groups]``: the decoder has spread them over the columns."""
        import torch

        spread = torch.as_tensor(part).expand_as(stored.level).reshape(-1, self._width)
        return spread[:, :: self._rule.columns or self._width].double()

    def _completed(self, lines: _Blocks) -> Iterator[_Blocks]:
        """Yield the row of blocks that are complete with some lines."""
        numbers = lines.numbers // self._height * self._high + lines.numbers % self._height // self._rule.rows
        for block in sorted(set(numbers.tolist())):
            own = (numbers == block).nonzero().flatten()
            tops = lines.tops[:, :, own].amax(2, keepdim=True)
            seen, before = self._begun.pop(block, (0, tops))
            seen, tops = seen + len(own), tops.maximum(before)
            # The last blocks of a matrix may be cut off.
            if seen == min(self._rule.rows, self._height - block % self._high * self._rule.rows):
                yield _Blocks(numbers[own[:1]], tops, lines.scale[own[:1]], lines.zero[own[:1]])
            else:
                self._begun[block] = seen, tops

    def _compare(self, blocks: _Blocks) -> None:
        rule, scale = self._rule, blocks.scale
        sides = rounded(blocks.tops, "BF16")
        size = rounded(sides.sum(1), "BF16") if rule.has_zeros else sides[:, 0]
        if self._overall is not None:
            # The decoder has divided it.
            scale = rounded(scale * self._overall, "F8_E4M3")
            largest = size.amax((1, 2))
            self._largest = largest if self._largest is None else self._largest.maximum(largest)
        wrong = ~rule.is_explained(scale, size) & is_known(size)
        self._count(SCALE, blocks, wrong, lambda *at: told("scale", scale[at], rule.stored(size[:, *at])))
        if rule.has_zeros:
            is_right, ends = zeros_explained(rule, blocks.zero, scale, size, sides[:, 1])
            wrong = ~is_right & is_known(size)
            self._count(ZERO, blocks, wrong, lambda *at: told("zero point", blocks.zero[at], ends[:, *at]))

    def _count(
        self, role: str, blocks: _Blocks, wrong: torch.Tensor, tell: Callable[[int, int], str]
    ) -> None:
        """Remember how many entries of a part are wrong, and the first of them.

        Args:
            role: of the part.
            blocks: the rows of blocks.
            wrong: bool ``[n, groups]``.
            tell: row of blocks and group → a sentence.
        """
        tally = self._tallies[role]
        tally.n_compared += wrong.numel()
        if not wrong.any():
            return
        if not tally.n_wrong:
            row, group = (int(index) for index in wrong.nonzero()[0])
            tally.first = f"{self._where(int(blocks.numbers[row]), group)}: {tell(row, group)}"
        tally.n_wrong += int(wrong.sum())

    def _where(self, block: int, group: int) -> str:
        """Return the place of a block in the part that has the scales."""
        matrix, row = divmod(block, self._high)
        if self._rule.is_transposed:
            row, group = group, row
        prefix = f"matrix {matrix}, " if self._n_lines > self._height else ""
        return f"{prefix}row {row}, group {group}"


def is_known(size: torch.Tensor) -> torch.Tensor:
    """Return where both limits are finite. Of values that are not, nothing is said here: the comparison of values tells them.

    Args:
        size: numbers of bfloat16, ``[2, …]``.
    """
    return (size <= LARGEST["BF16"]).all(0)


def told(what: str, found: torch.Tensor, expected: torch.Tensor) -> str:
    """Return a sentence about an entry that is wrong.

    Args:
        what: it is, for people.
        found: float64, one number.
        expected: float64 ``[2]``, the limits of what is right.
    """
    # A sum with 0.0 has no negative zero.
    low, high = (f"{end + 0.0:.9g}" for end in sorted(expected.tolist()))
    return f"the {what} is {float(found):.9g}, expected {low}" + (f" to {high}" if low != high else "")


def _tops(candidates: Sequence[Value], width: int, columns: int) -> torch.Tensor:
    """Return how far the values of each group reach above zero, and how far below it: float64 ``[ends, sides, lines, groups]``. The ends
    are the lower limits of it and the upper ones.

    Args:
        candidates: what each value may be, and how far off float32 may be.
        width: of a line.
        columns: of a group. The last one may be cut off.
    """
    import torch

    low = reduce(torch.minimum, [exact - off for exact, off in candidates]).view(-1, width)
    high = reduce(torch.maximum, [exact + off for exact, off in candidates]).view(-1, width)
    if missing := -width % columns:
        # A value that is there already changes no largest one.
        low, high = (torch.cat([end, end[:, -1:].expand(-1, missing)], 1) for end in (low, high))
    low, high = (end.view(len(end), -1, columns) for end in (low, high))
    found = torch.stack([low.amax(-1), -high.amin(-1), high.amax(-1), -low.amin(-1)])
    return torch.unflatten(found.clamp_(min=0), 0, (2, 2))
