"""Codecs: stored bytes ↔ float32. One file for each storage; `CODECS` is the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.codecs.codec import Codec
from lora_merge.codecs.dense import Dense
from lora_merge.core.weight import DENSE, Weight

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_merge.core.tensor import TensorRef

__all__ = ["CODECS", "Codec", "recognised"]

CODECS: dict[str, Codec] = {DENSE: Dense()}


def recognised(
    tensors: Iterable[TensorRef], config: Mapping[str, Any]
) -> tuple[dict[str, Weight], tuple[TensorRef, ...]]:
    """Group the tensors of a checkpoint into weights, by name; also return the tensors that belong to no weight.

    Each codec takes what it knows; plain tensors come last, since the parts of other storages look like them.
    """
    left = {ref.name: ref for ref in tensors}
    weights: dict[str, Weight] = {}
    # Dense last: the parts of another storage (packed values, scales) look like plain tensors.
    for name in sorted(CODECS, key=lambda name: name == DENSE):
        # A list: what is found is removed from `left` while the codec would still iterate over it.
        for weight in list(CODECS[name].recognise(left, config)):
            weights[weight.name] = weight
            for ref in weight.parts.values():
                del left[ref.name]
    return weights, tuple(left.values())
