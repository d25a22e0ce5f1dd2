"""gpt-oss: its experts are stacks, and engines load them in an MXFP4 of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.quantised.schemes import OF_GPT_OSS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from lora_merge.planning.linear_layers import Matrix
    from lora_merge.quantised.schemes import Scheme

_MODEL_TYPE = "gpt_oss"
_STACKS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")

_DENSE = ("layers.*.self_attn", "layers.*.mlp.router", "embed_tokens")
"""What the published configuration leaves dense, below the model; and `_HEAD`."""

_HEAD = "lm_head"


def is_gpt_oss(config: Mapping[str, Any], matrices: Sequence[Matrix]) -> bool:
    """Return True for a model of the family whose experts are stacks, as transformers 5.23 replaces them (``GptOssMLP``).

    Args:
        config: ``config.json``.
        matrices: of the model.
    """
    stacks = [one.name for one in matrices if one.kind == "stack"]
    return (
        config.get("model_type") == _MODEL_TYPE
        and bool(stacks)
        and all(name.endswith(_STACKS) for name in stacks)
    )


def own_scheme(scheme: Scheme) -> Scheme:
    """Return what a scheme is for gpt-oss: the same, or the one that its engines know by this name."""
    return OF_GPT_OSS.get(scheme.name, scheme)


def named_dense(stacks: Sequence[Matrix], dense: Sequence[Matrix]) -> tuple[str, ...]:
    """Return what the configuration names as dense: the entries of openai/gpt-oss-20b, and the experts that stay dense.

    Args:
        stacks: all stacks of experts.
        dense: those that are not quantised.
    """
    model, _, _ = stacks[0].module.partition("layers.")
    return (*(model + name for name in _DENSE), _HEAD, *dict.fromkeys(one.module for one in dense))
