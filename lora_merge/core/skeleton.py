"""The module tree of a model that transformers knows, without weights: classes, output embedding, ties.

Most plans never need it: names and shapes on disk decide. It is built, on torch's meta device, only where
they cannot: a square weight that may be a ``Conv1D``, ``"all-linear"``, a targeted module without tensors.
Code that a checkpoint carries is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.core.checkpoint import config_levels

CONV1D_MODEL_TYPES = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder", "clvp_encoder"}
)
"""Families of transformers 5.23 with ``Conv1D`` layers, whose weights are stored ``[in, out]``."""

_LINEAR = frozenset({"Linear", "Conv1D"})


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a model is made of."""

    classes: Mapping[str, str]
    """Module path → class name; a subclass of ``nn.Linear`` says ``Linear``."""

    output_embedding: str | None
    """Path of the output embedding (``lm_head``), if the model has one."""

    tied: Mapping[str, str]
    """Parameter → the parameter whose storage it shares."""

    def is_linear(self, module: str) -> bool:
        """Return True for a linear layer, ``Conv1D`` included."""
        return self.classes.get(module) in _LINEAR

    def all_linear(self) -> frozenset[str]:
        """Return the modules that PEFT's ``"all-linear"`` stands for.

        Reference:
            ``peft.tuners.tuners_utils._maybe_include_all_linear_layers`` (PEFT 0.21.2).
        """
        linear = {module for module in self.classes if self.is_linear(module)}
        return frozenset(linear - {self.output_embedding})


def may_hold_conv1d(config: Mapping[str, Any]) -> bool:
    """Return True when a family in the config, at any level, has ``Conv1D`` layers."""
    return any(level.get("model_type") in CONV1D_MODEL_TYPES for _, level in config_levels(config))


def build_skeleton(config: Mapping[str, Any]) -> Skeleton | None:
    """Return the skeleton of a ``config.json``, or None when transformers has no class for it.

    Imports transformers (seconds); allocates no weights.
    """
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    names = config.get("architectures") or []
    if model_type not in CONFIG_MAPPING or not names:
        return None
    model_class = getattr(transformers, names[0], None)
    if model_class is None:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            parsed = CONFIG_MAPPING[model_type].from_dict(dict(config))
            model = model_class(parsed)
    except Exception:  # noqa: BLE001 - a config that its own class rejects is as good as unknown
        return None
    return _describe(model)


def _describe(model: Any) -> Skeleton:
    import torch
    from transformers.pytorch_utils import Conv1D

    def class_name(module: torch.nn.Module) -> str:
        if isinstance(module, Conv1D):
            return "Conv1D"
        return "Linear" if isinstance(module, torch.nn.Linear) else type(module).__name__

    output = model.get_output_embeddings()
    return Skeleton(
        classes={path: class_name(module) for path, module in model.named_modules()},
        output_embedding=next((path for path, module in model.named_modules() if module is output), None)
        if output is not None
        else None,
        tied=dict(getattr(model, "all_tied_weights_keys", None) or {}),
    )
