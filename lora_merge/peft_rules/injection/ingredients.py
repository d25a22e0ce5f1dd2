"""What PEFT needs for an injection: its tuner and configuration of the adapter, and the model without weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.modeling.plain_config import plain_adapter_config
from lora_merge.modeling.skeleton import model_class, parse_config
from lora_merge.peft_rules.injection.targets import InjectionError
from lora_merge.peft_rules.injection.turns import translated
from lora_merge.peft_rules.kinds import NATIVE
from lora_merge.runtime.packages import require

if TYPE_CHECKING:
    import torch

_UNMERGEABLE: Mapping[str, str] = {
    "LILY": "a router mixes its factors for each token",
    "POLY": "a router mixes its factors for each task",
    "SHADOW": "it is a network next to the model",
    "XLORA": "a router mixes its adapters for each token",
}
"""PEFT types with a tuner, but no merge; PEFT merges ``XLORA`` anyway, without its router."""


def need_peft(kind: str) -> None:
    """Check that PEFT's own layers can be used here. Imports PEFT and transformers, which takes seconds.

    Args:
        kind: the PEFT type of the adapter that they are to merge.

    Raises:
        PackageError: PEFT or transformers cannot be used here.
    """
    feature = f"merging this variant of {kind}" if kind in NATIVE else f"merging an adapter of type {kind}"
    for package in ("peft", "transformers"):
        require(package, feature)


def tuner_class_of(peft_type: Any) -> Any:
    """Return PEFT's tuner class for a type.

    Raises:
        InjectionError: PEFT does not know the type, or cannot merge it.
        PackageError: PEFT or transformers cannot be used here.
    """
    need_peft(str(peft_type))
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    if peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
        raise InjectionError("peft_type", f"the installed PEFT does not know {peft_type}")
    if peft_type in _UNMERGEABLE:
        raise InjectionError("peft_type", f"{peft_type} cannot be merged: {_UNMERGEABLE[peft_type]}")
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]
    if not issubclass(tuner_class, BaseTuner):
        raise InjectionError("peft_type", f"{peft_type} cannot be merged: it changes no weights")
    return tuner_class


def peft_config(adapter_config: Mapping[str, Any]) -> Any:
    """Return PEFT's config object of an adapter, as ``PeftConfig.from_pretrained`` makes it.

    Raises:
        InjectionError: it repeats layers.
    """
    from peft import PeftConfig

    # PEFT writes into its config, and the caller's is read again.
    plain = copy.deepcopy(plain_adapter_config(adapter_config))
    config = PeftConfig.from_peft_type(**PeftConfig.check_kwargs(**plain))
    config.inference_mode = True
    # PEFT's own guard against this does not work: copies of a layer share one weight, which would get all deltas.
    if getattr(config, "layer_replication", None):
        raise InjectionError("layer_replication", "PEFT would merge all copies of a layer into one weight")
    return config


def meta_model(config: Mapping[str, Any]) -> torch.nn.Module:
    """Return a new model of a ``config.json`` on the meta device, in eval mode.

    Raises:
        InjectionError: transformers has no class for it, or its class refuses the config.
    """
    import torch

    model_type, names = config.get("model_type"), config.get("architectures")
    known = model_class(config)
    if known is None:
        named = names[0] if isinstance(names, list) and names else "none"
        raise InjectionError("architectures", f"the installed transformers does not know {named}")
    # Not the shared model of `lora_merge.modeling.skeleton`: PEFT changes this one.
    with translated("config.json", "transformers"), torch.device("meta"):
        parsed = parse_config(config)
        if parsed is None:
            raise InjectionError("model_type", f"the installed transformers does not know {model_type}")
        model: torch.nn.Module = known(parsed)
    return model.eval()
