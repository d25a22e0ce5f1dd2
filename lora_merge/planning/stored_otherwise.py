"""Quantised bases whose layout differs from that of transformers, so that a decoded output would be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.report import Issue, error
from lora_merge.modeling.skeleton import CONV1D_MODEL_TYPES
from lora_merge.planning.mlx_conventions import OTHER_NORMS_IN_MLX, OTHER_WEIGHTS_IN_MLX
from lora_merge.quantised.mlx import is_mlx, named_by_mlx

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.weight import Weight

_ORIGINAL = "merge into the original model: --base ORIGINAL"
_IN_MLX = f"{_ORIGINAL}; or use mlx_lm.fuse, for mlx-lm"
_KEPT = f"{_IN_MLX}; or pass --out-storage mixed, which keeps the layout of mlx-lm"


def turned_matrices(base: Checkpoint) -> list[Issue]:
    """Return an error for a quantised base of a family with ``Conv1D``: libraries turn its matrices round before they
    quantise them, ``[in, out]`` to ``[out, in]`` (transformers 5.23, ``integrations/bitsandbytes.py``; GPTQModel 7.7).
    """
    families = {str(level.get("model_type")) for _, level in config_levels(base.config)}
    name = _first_quantised(base.weights)
    found = sorted(families & CONV1D_MODEL_TYPES)
    if not name or not found:
        return []
    sentence = (
        f"is stored quantised, and {found[0]!r} stores its matrices as [in, out]; quantising transposed them"
    )
    return [error("unsupported", name, sentence, _ORIGINAL)]


def in_mlx_layout(base: Checkpoint) -> list[Issue]:
    """Return an error for a base of mlx-lm that is stored in mlx-lm's own layout: no other engine could load it decoded.

    Most families have the names and values of transformers there (mlx-lm 0.32, ``sanitize`` of each model).
    """
    if not is_mlx(base.quantisation):
        return []
    families = {str(level.get("model_type")) for _, level in config_levels(base.config)}
    if found := sorted(families & OTHER_NORMS_IN_MLX):
        sentence = f"is {found[0]!r}, whose norms mlx-lm stores with 1 added, so a dense output would have wrong norms"
        return [error("unsupported", "model_type", sentence, _KEPT)]
    if found := sorted(families & OTHER_WEIGHTS_IN_MLX.keys()):
        sentence = f"is {found[0]!r}, and mlx-lm {OTHER_WEIGHTS_IN_MLX[found[0]]} when it converts them"
        return [error("unsupported", "model_type", sentence, _KEPT)]
    odd = named_by_mlx({name: weight.shape for name, weight in base.parameters().items()}, base.config)
    if not odd:
        return []
    sentence = "has a name or layout that only mlx-lm uses, so no other engine could load a dense output"
    return [error("unsupported", odd, sentence, _KEPT)]


def _first_quantised(weights: Mapping[str, Weight]) -> str:
    return next((name for name, weight in weights.items() if weight.plain is None), "")
