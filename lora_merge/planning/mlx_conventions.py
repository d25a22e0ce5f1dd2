"""Adapters of mlx-lm that were trained on other weights than those that the base stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.report import Issue, error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.adapter import Adapter

OTHER_WEIGHTS_IN_MLX = {
    "falcon_h1": "multiplies the weights by the config's multipliers",
    "baichuan_m1": "divides the rows of the output embedding by their length",
    "bailing_moe": "divides the columns of the output embedding by their length",
    "bailing_moe_linear": "divides the columns of the output embedding by their length",
}
"""Family → how mlx-lm 0.32 changes its matrices when it loads them, so that deltas do not fit the stored ones."""

OTHER_NORMS_IN_MLX = frozenset(
    {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "step3p5"}
)
"""Families to whose norms mlx-lm 0.32 adds 1 when it loads them."""


_TURNED_IN_MLX = frozenset({"gpt2"})
"""Families whose matrices mlx-lm 0.32 stores ``[out, in]`` and transformers ``[in, out]``."""


def origin_issues(adapter: Adapter, config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue when the weights that an adapter of mlx-lm was trained on are not those that the base stores."""
    if adapter.format != "mlx":
        return []
    families = {str(level.get("model_type")) for _, level in config_levels(config)}
    for family in sorted(families & OTHER_WEIGHTS_IN_MLX.keys()):
        sentence = f"is {family!r}, and mlx-lm {OTHER_WEIGHTS_IN_MLX[family]} when it loads them"
        return [error("unsupported", "model_type", sentence, "merge it with mlx_lm.fuse")]
    # Deltas do not have this problem: layouts find the orientation of a stored weight.
    matrices = [parameter for parameter, one in adapter.replacements.items() if len(one.ref.shape) > 1]
    if matrices and families & _TURNED_IN_MLX:
        sentence = "was trained as a whole in mlx-lm, which stores the matrices of this family transposed"
        return [error("unsupported", min(matrices), sentence, "merge it with mlx_lm.fuse")]
    norms = [parameter for parameter in adapter.replacements if "norm" in parameter]
    if norms and families & OTHER_NORMS_IN_MLX:
        sentence = "was trained in mlx-lm, which adds 1 to the norms of this family when it loads them"
        return [error("unsupported", norms[0], sentence, "merge it with mlx_lm.fuse")]
    return []
