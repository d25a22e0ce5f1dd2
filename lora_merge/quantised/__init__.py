"""How checkpoints say that weights are quantised: one file for each method, in the table `METHODS`.

`identify` groups the tensors of a checkpoint into weights, by their names and by the configuration, which have to agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.weight import Weight
from lora_merge.quantised.method import Found, Method, Surroundings

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.tensor import TensorRef

__all__ = ["METHODS", "Found", "Method", "Surroundings", "identify"]

METHODS: dict[str, Method] = {}


def identify(tensors: Iterable[TensorRef], around: Surroundings) -> Found:
    """Group the tensors of a checkpoint into weights, by name.

    Args:
        tensors: in the order of the files.
        around: the configuration, and what else says how they are stored.
    """
    left = {ref.name: ref for ref in tensors}
    weights: dict[str, Weight] = {}
    for method in METHODS.values():
        found = method.identify(left, around)
        for weight in found.weights.values():
            weights[weight.name] = weight
            for ref in weight.parts.values():
                del left[ref.name]
    # Dense last: the parts of another storage (packed values, scales) look like plain tensors.
    for ref in [ref for ref in left.values() if ref.dtype in TORCH_NAMES]:
        weights[ref.name] = Weight.dense(left.pop(ref.name))
    return Found(weights, tuple(left.values()))
