"""How checkpoints say that weights are quantised: one file for each method, in the table `METHODS`.

`identify` groups the tensors of a checkpoint into weights, by their names and by the configuration, which have to agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.weight import Weight
from lora_merge.quantised.describing import describe
from lora_merge.quantised.excepting import excepting
from lora_merge.quantised.method import Found, Method, PatternError, Surroundings
from lora_merge.quantised.outputs import SIDE_FILES, folds_norms, leftover, plain_config, stored_dtype
from lora_merge.quantised.refused import refusals
from lora_merge.quantised.tables import settings_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef

__all__ = [
    "METHODS",
    "SIDE_FILES",
    "Found",
    "Method",
    "PatternError",
    "Surroundings",
    "describe",
    "excepting",
    "folds_norms",
    "identify",
    "leftover",
    "plain_config",
    "refusals",
    "stored_dtype",
]

METHODS: dict[str, Method] = {}


def identify(tensors: Iterable[TensorRef], around: Surroundings) -> Found:
    """Group the tensors of a checkpoint into weights, by name.

    Args:
        tensors: in the order of the files.
        around: the configuration, and what else says how they are stored.
    """
    left = {ref.name: ref for ref in tensors}
    weights: dict[str, Weight] = {}
    issues: list[Issue] = []
    for method in METHODS.values():
        found = method.identify(left, around)
        issues += found.issues
        for weight in found.weights.values():
            weights[weight.name] = weight
            for ref in weight.parts.values():
                del left[ref.name]
    # Dense last: the parts of another storage (packed values, scales) look like plain tensors.
    for ref in [ref for ref in left.values() if ref.dtype in TORCH_NAMES]:
        weights[ref.name] = Weight.dense(left.pop(ref.name))
    settings = settings_of(around.config, around.side)
    return Found(weights, tuple(left.values()), settings, tuple(issues))
