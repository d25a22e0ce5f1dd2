"""Weights that store the group of each input: whether the groups are there."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.quantised.draft import AGAIN, CODE, Draft, Wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.weight import Storage
    from lora_merge.quantised.method import Surroundings

_UNSET = -1
"""Everywhere, in compressed-tensors: the groups are in order."""


def add_indexed(
    draft: Draft,
    name: str,
    shape: tuple[int, ...],
    how: Storage,
    wanted: Sequence[Wanted],
    groups: int,
    around: Surroundings,
) -> bool:
    """Add a weight as `Draft.add` does, whose part ``g_idx``, if it is wanted, has nothing but numbers of groups.

    Args:
        draft: to add it to.
        name: of the weight.
        shape: of its values.
        how: it is stored.
        wanted: its parts.
        groups: that a line has.
        around: reads the index.
    """
    part = next((one for one in wanted if one.role == "g_idx"), None)
    ref = draft.tensors.get(part.name) if part is not None else None
    # `Draft.add` notes an index that is missing, or is no index.
    if part is not None and ref is not None and ref.dtype in part.dtypes and ref.shape in part.shapes:
        may_be_unset = how.codec == "packed_int"
        odd = _odd(around.read(ref), groups, may_be_unset)
        if odd is not None:
            also = ", or -1 everywhere" if may_be_unset else ""
            sentence = f"has the index {odd}, expected 0 to {groups - 1}{also}"
            parts = [draft.tensors[one.name] for one in wanted if one.name in draft.tensors]
            return draft.refuse(error(CODE, ref.name, sentence, AGAIN), parts)
    return draft.add(name, shape, how, wanted)


# Most modules have their groups in order, so few indices of a checkpoint differ.
@lru_cache(maxsize=16)
def _odd(data: bytes, groups: int, may_be_unset: bool) -> int | None:
    """Return an index that is out of range; None where there is none."""
    found = set(struct.unpack(f"<{len(data) // 4}i", data))
    if may_be_unset and found == {_UNSET}:
        return None
    return next(
        (one for one in (max(found, default=0), min(found, default=0)) if not 0 <= one < groups), None
    )
