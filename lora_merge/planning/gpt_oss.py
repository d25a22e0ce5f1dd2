"""gpt-oss: its experts are stacks, and engines load them in a special MXFP4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import error, note
from lora_merge.quantised.schemes import OF_GPT_OSS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Issue
    from lora_merge.planning.joined import Joined
    from lora_merge.planning.linear_layers import Matrix
    from lora_merge.quantised.schemes import Scheme

_MODEL_TYPE = "gpt_oss"
_STACKS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")

_DENSE = ("layers.*.self_attn", "layers.*.mlp.router", "embed_tokens")
"""What the published configuration leaves dense, below the model; and `_HEAD`."""

_HEAD = "lm_head"

_ATTENTION_ALONE = (
    "this scheme quantises only the attention of gpt-oss; --quantize mxfp4 stores the experts as in the "
    "published model"
)
_APART = "its experts are not in stacks, and MXFP4 of gpt-oss needs stacks"


def scheme_for(joined: Joined, matrices: Sequence[Matrix], scheme: Scheme) -> tuple[Scheme, list[Issue]]:
    """Return the scheme to use for a model, with issues about it: gpt-oss has its own MXFP4.

    It is known by its configuration and by its stacks, which transformers 5.23 replaces (``GptOssMLP``).

    Args:
        joined: what the output is made of.
        matrices: of the model.
        scheme: that is wanted.
    """
    if joined.base.config.get("model_type") != _MODEL_TYPE:
        return scheme, []
    own = OF_GPT_OSS.get(scheme.name)
    stacks = [one.name for one in matrices if one.kind == "stack"]
    is_stacked = bool(stacks) and all(name.endswith(_STACKS) for name in stacks)
    if own is None:
        return scheme, [note("quantize", "", _ATTENTION_ALONE)] if is_stacked else []
    if not is_stacked:
        hint = "merge into a copy of the model whose experts are stacks, such as the published one"
        return scheme, [error("quantize", joined.base.root, _APART, hint)]
    return own, []


def named_dense(stacks: Sequence[Matrix], dense: Sequence[Matrix]) -> tuple[str, ...]:
    """Return what the configuration names as dense: the entries of openai/gpt-oss-20b, and the experts that stay dense.

    Args:
        stacks: all stacks of experts.
        dense: those that are not quantised.
    """
    model, _, _ = stacks[0].module.partition("layers.")
    return (*(model + name for name in _DENSE), _HEAD, *dict.fromkeys(one.module for one in dense))
