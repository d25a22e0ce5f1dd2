"""What an output says and drops whose weights are all dense."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.tensor import DTYPE_CODES
from lora_merge.quantised.tables import QUANT_STATE, keys_in, tables_of
from lora_merge.quantised.tables import SIDE_FILES as _READ

if TYPE_CHECKING:
    from collections.abc import Mapping

SIDE_FILES = frozenset({*_READ, "recipe.yaml", "quant_log.csv"})
"""Side files that say how weights are quantised, or were: a dense output has none of them."""

_LEFTOVER = re.compile(
    r"(?:^|[._])(?:(?:[kvq]|prob|kv)_(?:scale|zero_point)|(?:k|v)_proj\.output_scale|[kv]_proj\.[kv]_scale"
    r"|input_(?:scale|scale_ub|global_scale|zero_point)|activation_scale|qscale_act|output_(?:scale|zero_point)"
    r"|pre_quant_scale)$"
)
"""Scales of activations and of the cache of keys and values."""


def plain_config(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the dotted keys of a ``config.json`` that a dense output does not have, at every level.

    Example:
        >>> plain_config({"quantization": {"bits": 4}, "text_config": {"quantization_config": {"bits": 4}}})
        ('quantization', 'text_config.quantization_config')
    """
    return keys_in(config)


def leftover(name: str) -> bool:
    """Return True for a tensor of a quantised checkpoint that belongs to no weight, and that a dense one does not have.

    Example:
        >>> [leftover(name) for name in ("layers.0.attn.k_scale", "layers.0.k_proj.k_scale", "layers.0.k_proj.bias")]
        [True, True, False]
    """
    return _LEFTOVER.search(name) is not None


def stored_dtype(settings: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    """Return the dtype of a dense output, a safetensors code: the configuration's, else bitsandbytes', else BF16.

    Args:
        settings: as `identify` found them.
        config: ``config.json``.
    """
    text = config.get("text_config")
    levels = [config, text if isinstance(text, dict) else {}]
    named = [level.get(key) for level in levels for key in ("dtype", "torch_dtype")]
    named.append(settings.get(QUANT_STATE, {}).get("dtype"))
    codes = (DTYPE_CODES.get(str(name).removeprefix("torch.")) for name in named)
    return next((code for code in codes if code), "BF16")


def folds_norms(settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return True where quantising changed tensors that are stored dense: AWQ folds its scales into norms.

    An adapter that was trained on the original model does not fit such weights.
    """
    return any(_folds(table.method, table.values) for table in tables_of(settings))


def _folds(method: str, values: Mapping[str, Any]) -> bool:
    layers = values.get("quantized_layers")
    inner = layers.values() if isinstance(layers, dict) else ()
    algorithms = [
        values.get("quant_algo"),
        *(one.get("quant_algo") for one in inner if isinstance(one, dict)),
    ]
    return method == "awq" or any(str(name).upper().endswith("AWQ") for name in algorithms)
