"""Bases that are stored quantised: recognised by their configuration, or by names of their tensors."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.report import Issue, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.checkpoint import Checkpoint

_QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|weight_scale_2|SCB|absmax|quant_map"
    r"|weight\.(absmax|quant_map|quant_state\..+))$|_(blocks|scales)$"
)
"""Names that only quantised storages have: GPTQ, AWQ, compressed-tensors, FP8, bitsandbytes, MXFP4."""


def quantised_config(config: Mapping[str, Any]) -> list[Issue]:
    """Return an error when a base's configuration, at any level, says that it is stored quantised."""
    for path, level in config_levels(config):
        settings = level.get("quantization_config")
        if settings:
            method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else "unnamed"
            subject = f"{path}.quantization_config" if path else "quantization_config"
            sentence = f"the base is stored quantised ({method})"
            return [error("unsupported", subject, sentence, _parent_hint(config))]
    return []


def quantised_base(base: Checkpoint) -> list[Issue]:
    """Return an error when a base is stored quantised in a way that no codec knows."""
    issues = quantised_config(base.config)
    if issues:
        return issues
    # Parts of weights that a codec reads.
    known = {
        ref.name for weight in base.weights.values() if weight.plain is None for ref in weight.parts.values()
    }
    for ref in base.tensors():
        if ref.name in known:
            continue
        # A vector of eight bits may be a scale or a buffer; a matrix is a weight.
        low = ref.dtype.startswith(("F8_", "F6_", "F4")) and len(ref.shape) >= 2
        if low or _QUANTISED_NAMES.search(ref.name):
            sentence = f"the base is stored quantised (a {ref.dtype} tensor of this name)"
            return [error("unsupported", ref.name, sentence, _parent_hint(base.config))]
    return []


def _parent_hint(config: Mapping[str, Any]) -> str:
    parent = config.get("_name_or_path")
    return "merge into its full-precision parent: --base PARENT" + (f" (perhaps {parent})" if parent else "")
