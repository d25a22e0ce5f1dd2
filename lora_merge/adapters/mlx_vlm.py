"""mlx-vlm's own adapters, as it wrote them until May 2026; since then it writes mlx-lm's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.peft_rules.patterns import TargetError
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.tensor import TensorRef

_LEAVES = {"A": "lora_a", "B": "lora_b"}


def is_mlx_vlm(config: Mapping[str, Any], refs: Sequence[TensorRef]) -> bool:
    """Return True for an adapter that mlx-vlm wrote in its own format: ``{rank, alpha, dropout}`` and ``….A``, ``….B``.

    Reference:
        ``mlx_vlm.trainer.utils.apply_lora_layers``, ``mlx_vlm.trainer.lora.LoRaLayer`` (mlx-vlm 0.5.0).
    """
    leaves = {ref.name.rpartition(".")[2] for ref in refs}
    return "rank" in config and "lora_parameters" not in config and leaves == _LEAVES.keys()


def as_mlx_lm(
    config: Mapping[str, Any], refs: Sequence[TensorRef]
) -> tuple[dict[str, Any], tuple[TensorRef, ...]]:
    """Return the configuration and the tensors of an adapter of mlx-vlm as mlx-lm would have written them.

    Raises:
        TargetError: the scale is unknown.
    """
    rank, alpha = config["rank"], config.get("alpha")
    # mlx-vlm multiplied by alpha until 2026-04-18 (release 0.4), by alpha/rank after that (commit 6b0ad8f0), and its
    # config shows no release. With rank 1 both are the same; a ``scale`` that the user adds settles it.
    scale = config.get("scale", alpha if rank == 1 else None)
    if scale is None:
        sentence = (
            f"is {quoted(alpha)}: mlx-vlm multiplied by alpha up to release 0.4, and by alpha/rank from "
            "release 0.5; the config does not show which release trained the adapter"
        )
        advice = f"add the scale to adapter_config.json: {_choice(alpha, rank)}"
        raise TargetError("alpha", f"{sentence}; {advice}")
    keys = sorted({ref.name.rpartition(".")[0] for ref in refs})
    renamed = tuple(replace(ref, name=_renamed(ref.name)) for ref in refs)
    settings = {"rank": rank, "scale": scale, "keys": keys}
    # All layers: the keys are whole paths, and name the trained ones.
    return {"lora_parameters": settings, "num_layers": -1, "fine_tune_type": "lora"}, renamed


def _choice(alpha: object, rank: object) -> str:
    """Return the two scales that are possible, as the user would write them into the JSON."""
    is_known = all(isinstance(value, int | float) and value for value in (alpha, rank))
    later = f"{alpha / rank:g}" if is_known else "alpha/rank"  # type: ignore[operator]
    return f'"scale": {alpha} (until 0.4) or "scale": {later} (from 0.5 on)'


def _renamed(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_LEAVES[leaf]}"
