"""Is the one scale of whole tensors right? The largest value of all weights that an engine loads as one decides.

So it is compared last, and only where all rows of all of them have been recomputed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.new_scales import GLOBAL, rule_of_overall
from lora_merge.checks.scales import is_known, told
from lora_merge.core.report import error

if TYPE_CHECKING:
    from collections.abc import Hashable

    import torch

    from lora_merge.checks.reading import Reader
    from lora_merge.checks.scales import Scales
    from lora_merge.core.plan import Merge
    from lora_merge.core.report import Issue
    from lora_merge.core.weight import Weight


class OverallScales:
    """The scales of whole tensors of one output."""

    def __init__(self) -> None:
        self._largest: dict[Hashable, torch.Tensor] = {}

    def add(self, op: Merge, scales: Scales) -> None:
        """Remember how large a weight is. Several threads may call this.

        Args:
            op: what was done to it.
            scales: all of its rows that are recomputed have been added.
        """
        if scales.largest is not None:
            self._largest[_key(op)] = scales.largest

    def issue(self, op: Merge, weight: Weight, reader: Reader) -> Issue | None:
        """Return an issue if the scale of a weight is wrong; None too where it has none, or not all is known that it depends on.

        Args:
            op: what was done.
            weight: as it is in the output.
            reader: of all files.
        """
        if GLOBAL not in weight.parts:
            return None
        sizes = [self._largest.get(_key(one)) for one in (op, *op.surveyed)]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes):
            return None
        import torch

        rule, part = rule_of_overall(), weight.parts[GLOBAL]
        size, found = torch.stack(known).amax(0)[:, None], reader.whole(part)
        if not is_known(size) or rule.is_explained(found, size):
            return None
        return error("wrong-scale", part.name, told("scale of the tensor", found, rule.stored(size)[:, 0]))


def _key(op: Merge) -> Hashable:
    """Return what tells a weight from the others. One that is stored once may be written apart, each time with other changes."""
    return op.source, tuple((delta.adapter, delta.delta.parameter) for delta in op.deltas)
