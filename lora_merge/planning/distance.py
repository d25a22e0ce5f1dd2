"""How far two copies of a base are apart, measured by what an adapter changes: ‖q‖ / ‖Δ‖ of some tensors.

q is the difference of the copies: what quantising did to the weights. It is measured on a sample of rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from lora_merge.checks.expecting import is_plain_product
from lora_merge.deltas.factors import FactorFacts, Factors
from lora_merge.deltas.low_rank import plain_pair
from lora_merge.formats.safetensors import load, load_numbers
from lora_merge.formats.weights import WeightReader, is_read_alone
from lora_merge.runtime.shortage import BLAS_BYTES, need_room
from lora_merge.runtime.torch_threads import one_torch_thread

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.weight import Weight

MOST_TENSORS = 64
SAMPLE_ELEMENTS = 1 << 18
"""Of one tensor."""

MOST_BYTES = 1 << 30
"""That are read of both copies. Of some storages (GPTQ, AWQ) a few rows need the whole tensor."""

_SPANS = 4
"""Runs of rows, spread over the tensor."""


def distances(
    ours: Mapping[str, Weight], others: Mapping[str, Weight], deltas: Mapping[str, Sequence[PlacedDelta]]
) -> dict[str, float]:
    """Return ‖q‖ / ‖Δ‖ by tensor. A tensor is left out where the copies cannot be compared, or ‖Δ‖ does not follow from
    factors, and where Δ is zero.

    Args:
        ours: the weights that an adapter changes, by name.
        others: all weights of another copy of the base.
        deltas: what the adapter changes them by.

    Raises:
        CheckpointError: a file cannot be read.
    """
    names = [name for name in ours if _is_comparable(ours[name], others.get(ours[name].name), deltas[name])]
    # Spread over the layers, which are in order.
    names = names[:: max(1, -(-len(names) // MOST_TENSORS))]
    weights = [weight for name in names for weight in (ours[name], others[ours[name].name])]
    has_torch = not (
        all(map(is_read_alone, weights))
        and all(is_plain_product(delta) for name in names for delta in deltas[name])
    )
    # For samples of this size torch's threads take longer to wait for each other than to work.
    with one_torch_thread(has_torch=has_torch):
        return _distances(names, ours, others, deltas)


def _distances(
    names: Sequence[str],
    ours: Mapping[str, Weight],
    others: Mapping[str, Weight],
    deltas: Mapping[str, Sequence[PlacedDelta]],
) -> dict[str, float]:
    found: dict[str, float] = {}
    factors, left = Factors(load), MOST_BYTES
    for name in names:
        norm = _delta_norm(deltas[name], factors)
        if not norm or not math.isfinite(norm):
            continue
        one, other = ours[name], others[ours[name].name]
        left -= _bytes_read(one) + _bytes_read(other)
        # One tensor is measured whatever it takes: without any, nothing could be said.
        if left < 0 and found:
            break
        ratio = _difference(one, other) * math.sqrt(_n_changed(one, deltas[name])) / norm
        if math.isfinite(ratio):
            found[name] = ratio
    return found


def _is_comparable(one: Weight, other: Weight | None, deltas: Sequence[PlacedDelta]) -> bool:
    return (
        other is not None
        and one.shape == other.shape
        and len(one.shape) > 1
        and math.prod(one.shape) > 0
        # q is what quantising did: two dense copies have none.
        and not (one.storage.is_dense and other.storage.is_dense)
        and bool(deltas)
        and all(delta.facts.has_factors and delta.facts.is_sum for delta in deltas)
    )


def _n_changed(weight: Weight, deltas: Sequence[PlacedDelta]) -> int:
    """Return how many elements of a tensor an adapter changes."""
    boxes = {delta.region.box for delta in deltas}
    whole = math.prod(weight.shape)
    return whole if () in boxes else sum(math.prod(end - start for start, end in box) for box in boxes)


def _delta_norm(deltas: Sequence[PlacedDelta], factors: Factors) -> float:
    """Return ‖Δ‖ of one adapter's change of one tensor; the parts that it consists of are disjoint."""
    # Of the adapter as it was trained, without the weight that a merge gives it.
    return math.sqrt(sum(delta.delta.effective_scale**2 * _square(delta, factors) for delta in deltas))


def _square(delta: PlacedDelta, factors: Factors) -> float:
    """Return ‖B A‖², by the small products Bᵀ B and A Aᵀ."""
    import numpy as np

    if is_plain_product(delta):
        left, right = (load_numbers(delta.factors[role]) for role in ("B", "A"))
        need_room(BLAS_BYTES, "multiply matrices")
        with np.errstate(all="ignore"):  # a norm that is not finite is left out
            return max(float(((right @ right.T) * (left.T @ left)).sum(dtype=np.float64)), 0.0)
    import torch

    found = factors.of(delta.delta, delta.part)
    if delta.facts.is_stacked:
        a, b = found["A"].float(), found["B"].float()
    else:
        a, b = plain_pair(cast("FactorFacts", delta.facts), found)
    # Rounding may leave a sum next to zero below it.
    return float(((a @ a.mT) * (b.mT @ b)).sum(dtype=torch.float64).clamp(min=0))


def _rows(weight: Weight) -> int:
    """Return the rows that a weight is divided into: of a stack, those of all its matrices."""
    shape = weight.shape
    return shape[0] * shape[1] if len(shape) == 3 else shape[0]


def _sample(n_rows: int, columns: int) -> list[tuple[int, int]]:
    """Return runs of rows, spread evenly.

    Example:
        >>> _sample(1000, 1 << 14)
        [(0, 4), (332, 336), (664, 668), (996, 1000)]
        >>> _sample(8, 16)
        [(0, 8)]
    """
    wanted = max(1, SAMPLE_ELEMENTS // max(columns, 1))
    if wanted >= n_rows:
        return [(0, n_rows)]
    size = max(1, wanted // _SPANS)
    last = n_rows - size
    starts = sorted({last * n // (_SPANS - 1) for n in range(_SPANS)})
    return [(start, start + size) for start in starts]


def _bytes_read(weight: Weight) -> int:
    """Return how many bytes the sample of a weight takes, about."""
    n_rows = _rows(weight)
    reader = WeightReader(weight, n_rows, is_watched=True)
    tiles = [
        reader.tile(*reader.widened(*span)) for span in _sample(n_rows, math.prod(weight.shape) // n_rows)
    ]
    # What is the same for every tile is read once.
    parts = {(role, part.ranges): part.nbytes for tile in tiles for role, part in reader.ranges(tile).items()}
    return sum(parts.values())


def _difference(one: Weight, other: Weight) -> float:
    """Return the root mean square of the difference of two weights, over the sample."""
    import numpy as np

    n_rows = _rows(one)
    total, count = 0.0, 0
    with (
        WeightReader(one, n_rows, is_watched=True) as mine,
        WeightReader(other, n_rows, is_watched=True) as theirs,
    ):
        for start, end in _sample(n_rows, math.prod(one.shape) // n_rows):
            with np.errstate(all="ignore"):  # a ratio that is not finite is left out
                difference = mine.numbers(start, end) - theirs.numbers(start, end)
                total += float((difference * difference).sum(dtype=np.float64))
            count += difference.size
    return math.sqrt(total / count)
