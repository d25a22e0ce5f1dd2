"""Linear layers that a model never calls: it reads their weights itself, so an adapter on them computes nothing.

PEFT puts its layer in the place of the model's, and the model takes the base's weight out of it. Training leaves such
an adapter at zero; one that is not zero would change the merged model, and not the one with the adapter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.peft_rules.targets import is_listed

if TYPE_CHECKING:
    from collections.abc import Mapping

BYPASSED: Mapping[str, tuple[str, ...]] = {
    "falcon_mamba": ("mixer.dt_proj",),
    "jamba": ("mamba.dt_proj",),
    "longcat_flash": ("router.classifier",),
    "mamba": ("mixer.dt_proj",),
    "wavlm": ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"),
}
"""Family → ends of the paths of such layers. Reference: the families' ``modeling_*.py`` (transformers 5.23), where
``self.dt_proj.weight``, ``self.classifier.weight``, … are used in a product; convolutions are left out, since those of
the same kind are grouped and refused anyway."""


def is_bypassed(module: str, config: Mapping[str, Any]) -> bool:
    """Return True for a layer whose weight its model reads without ever calling the layer.

    Args:
        module: its path, as an adapter names it.
        config: ``config.json`` of the base.
    """
    return any(
        is_listed(module, BYPASSED.get(str(level.get("model_type")), ()))
        for _, level in config_levels(config)
    )
