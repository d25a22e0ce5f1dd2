"""How checkpoints say that weights are quantised: one file for each method, in the table `METHODS`.

`identify` groups the tensors of a checkpoint into weights, by their names and by the configuration, which have to agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.weight import Weight
from lora_merge.quantised.method import Found, Method, Surroundings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.choices import OutputDtype
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Storage

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


SIDE_FILES = frozenset(
    {"hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml", "quant_log.csv"}
)
"""Files beside the weights that say how they are quantised."""


def dense_dtype(base: Checkpoint) -> OutputDtype:
    """Return the dtype that decoded weights are stored in, as torch spells it."""
    del base
    return "bfloat16"


def describe(storage: Storage) -> str:
    """Return how a weight is stored, in words."""
    return storage.codec


def excepting(base: Checkpoint, decoded: Collection[str]) -> dict[str, Any]:
    """Return what says how weights are quantised, with some parameters among its exceptions: place → new table."""
    del base, decoded
    return {}


def is_leftover(name: str) -> bool:
    """Return True for a tensor that means nothing where no weight is quantised."""
    return name.endswith((".k_scale", ".v_scale", ".q_scale"))


def plain_keys(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the dotted keys of a configuration that say how weights are quantised."""
    return tuple(key for key in ("quantization_config", "quantization") if key in config)
