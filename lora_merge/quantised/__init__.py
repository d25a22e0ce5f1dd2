"""How checkpoints say that weights are quantised: one file for each method, in the table `METHODS`.

`identify` groups the tensors of a checkpoint into weights, by their names and by the configuration, which have to agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import error
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.core.weight import Weight
from lora_merge.quantised.awq import Awq
from lora_merge.quantised.bitsandbytes import Bitsandbytes
from lora_merge.quantised.compressed import CompressedTensors
from lora_merge.quantised.describing import describe
from lora_merge.quantised.disagreeing import contradictions, other_methods
from lora_merge.quantised.excepting import excepting, plain_metadata
from lora_merge.quantised.fbgemm import Fbgemm
from lora_merge.quantised.fp8 import Fp8
from lora_merge.quantised.gptq import Gptq
from lora_merge.quantised.method import Found, Method, PatternError, Surroundings
from lora_merge.quantised.mlx import Mlx
from lora_merge.quantised.modelopt import ModelOpt
from lora_merge.quantised.mxfp4 import Mxfp4
from lora_merge.quantised.outputs import SIDE_FILES, folds_norms, leftover, plain_config, stored_dtype
from lora_merge.quantised.refused import refusals
from lora_merge.quantised.stray import stray
from lora_merge.quantised.tables import SIDE_FILES as SETTINGS_FILES
from lora_merge.quantised.tables import settings_of
from lora_merge.quantised.torchao import TorchAO

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.tensor import TensorRef

__all__ = [
    "METHODS",
    "SETTINGS_FILES",
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
    "plain_metadata",
    "refusals",
    "stored_dtype",
]

METHODS: dict[str, Method] = {
    "fp8": Fp8(),
    "fbgemm_fp8": Fbgemm(),
    "compressed-tensors": CompressedTensors(),
    "modelopt": ModelOpt(),
    "mxfp4": Mxfp4(),
    "gptq": Gptq(),
    "awq": Awq(),
    "bitsandbytes": Bitsandbytes(),
    "torchao": TorchAO(),
    "mlx": Mlx(),
}


def identify(tensors: Iterable[TensorRef], around: Surroundings) -> Found:
    """Group the tensors of a checkpoint into weights, by name. Where tensors and configuration disagree, there is an issue.

    Args:
        tensors: in the order of the files.
        around: the configuration, and what else says how they are stored.
    """
    left = {ref.name: ref for ref in tensors}
    settings = settings_of(around.config, around.side)
    weights: dict[str, Weight] = {}
    broken: list[TensorRef] = []
    issues = [*refusals(around.config, around.side), *other_methods(settings)]
    is_refused = bool(issues)
    if not is_refused:
        issues += contradictions(settings)
    # Where the method is refused, what others would say of its tensors follows from that.
    for method in () if is_refused else METHODS.values():
        try:
            found = method.identify(left, around)
        except PatternError as exc:
            issues.append(
                error("quantised", next(iter(settings), ""), str(exc), "correct it in the configuration")
            )
            continue
        issues += found.issues
        settings |= found.settings
        weights |= found.weights
        for ref in [ref for weight in found.weights.values() for ref in weight.parts.values()]:
            del left[ref.name]
        broken += [left.pop(ref.name) for ref in found.others]
    if not issues:
        # After another fault, tensors that no method took are its consequence.
        issues += stray(left.values(), around.config)
    # Dense last: the parts of another storage (packed values, scales) look like plain tensors.
    for ref in [ref for ref in left.values() if ref.dtype in TORCH_NAMES]:
        # Without settings a tensor of such a name is a parameter of the model, like any other.
        if not (settings and leftover(ref.name)):
            weights[ref.name] = Weight.dense(left.pop(ref.name))
    return Found(weights, (*left.values(), *broken), settings, tuple(issues))
