"""Tied embeddings: one stored tensor that a model reads at both ends, and what a merge makes of it.

PEFT merges into the shared storage, which changes the end that the adapter did not mean. Here each end gets its own
changes: the tie is kept when they are the same, and both ends are written out when they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import (
    INPUT_NAMES,
    OUTPUT_NAMES,
    SCALED_WHEN_TIED,
    config_levels,
    owner_name,
)
from lora_merge.core.report import Issue, error, note

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.adapter import Adapter
    from lora_merge.planning.model import Model

UNTIED = "untied"
"""Code of the note that embeddings are untied."""

_TIED_BY_ENGINES = frozenset({"gemma", "gemma2", "cohere", "cohere2", "cohere2_moe", "mpt"})
"""Model types whose class in vLLM always ties the embeddings."""


@dataclass(frozen=True, slots=True)
class Tie:
    """Two parameters with one storage."""

    embedding: str
    """The input embedding's parameter, ``model.embed_tokens.weight`` for example."""

    head: str
    """The output embedding's."""

    stored: tuple[str, ...]
    """Which of the two names have a tensor: one of them, or both with equal values."""

    @property
    def source(self) -> str:
        """Name of a stored tensor that holds the values."""
        return self.stored[0]


def find_tie(model: Model, twins: frozenset[frozenset[str]]) -> Tie | None:
    """Return the tie of a model's embeddings if it is in effect, else None.

    Two stored ends are tied only when their values are equal, as transformers has it
    (``modeling_utils.tie_weights``, transformers 5.23).

    Args:
        model: the base.
        twins: pairs of stored tensors with equal values.
    """
    embedding, head = _ends(model)
    if not embedding or not head or not _is_flagged(model, embedding, head):
        return None
    embedding, head = model.stored.disk_name(embedding), model.stored.disk_name(head)
    stored = tuple(name for name in (embedding, head) if name in model.sources)
    # Two stored tensors that differ are not tied, even if the config says so.
    if not stored or (len(stored) == 2 and frozenset(stored) not in twins):
        return None
    return Tie(embedding, head, stored)


def _ends(model: Model) -> tuple[str, str]:
    """Return the parameters of the input and the output embedding; empty texts where they are not known."""
    known, names = model.skeleton, model.outline.names
    if known is not None and known.input_embedding and known.output_embedding:
        return f"{known.input_embedding}.weight", f"{known.output_embedding}.weight"
    # Without a class the names have to tell. An output embedding that is not stored is usually called lm_head.
    inputs = [name for name in names if owner_name(name) in INPUT_NAMES and name.endswith(".weight")]
    heads = [name for name in names if owner_name(name) in OUTPUT_NAMES and name.endswith(".weight")]
    return inputs[0] if len(inputs) == 1 else "", heads[0] if len(heads) == 1 else "lm_head.weight"


def ensures_tie(adapter: Adapter, embedding: str) -> bool:
    """Return True when an adapter says that an input embedding and what is tied to it change alike."""
    # PEFT reads the field only where the embedding is called so (peft.utils.constants.EMBEDDING_LAYER_NAMES, PEFT
    # 0.21.2). In mlx-lm the two ends are one parameter.
    heeded = adapter.format == "mlx" or owner_name(embedding) == "embed_tokens"
    return heeded and bool(adapter.config.get("ensure_weight_tying"))


def _is_flagged(model: Model, embedding: str, head: str) -> bool:
    """Return True when the model's class ties the two, or without a class when the config says so."""
    known = model.skeleton
    if known is not None:
        return embedding != head and known.tied.get(head, head) == known.tied.get(embedding, embedding)
    return any(level.get("tie_word_embeddings") for _, level in config_levels(model.config))


def untied_note(config: Mapping[str, Any], tie: Tie) -> Issue:
    """Return the note that embeddings are untied, and what the config says about it."""
    kept = (
        ". The config still says that they are tied; transformers still reads both" if _scaled(config) else ""
    )
    flag = f"; config.json says so{kept}" if _scaled(config) else "; tie_word_embeddings is now false"
    return note(UNTIED, tie.head, f"{_untied(tie)}, so the output stores both{flag}")


def untie_refusal(config: Mapping[str, Any], tie: Tie) -> Issue | None:
    """Return the error of embeddings that cannot be untied safely; None where they can be."""
    engines = next((kind for kind in _types(config) if kind in _TIED_BY_ENGINES), None)
    scaled = _scaled(config)
    if not (engines or scaled):
        return None
    why = (
        f"engines tie the embeddings of {engines} regardless of the config, and would use one for both"
        if engines
        else (
            f"{scaled} scales its output when the config says that embeddings are tied, so the config must "
            "keep saying so"
        )
    )
    hint = (
        "train again with both of them as targets or neither, or pass --allow-untie to store both (only "
        "transformers loads that correctly)"
    )
    return error("untie", tie.head, f"{_untied(tie)}; {why}", hint)


def _untied(tie: Tie) -> str:
    return f"differs from {tie.embedding} after the merge, and the base stores one tensor for both"


def _types(config: Mapping[str, Any]) -> list[str]:
    """Return the model types at all levels of a config."""
    return [str(level.get("model_type")) for _, level in config_levels(config)]


def _scaled(config: Mapping[str, Any]) -> str | None:
    """Return the model type that scales its output where embeddings are tied; None where none does."""
    return next((kind for kind in _types(config) if kind in SCALED_WHEN_TIED), None)


def untie_patch(config: Mapping[str, Any]) -> dict[str, bool]:
    """Return what an untied model changes in ``config.json``: the flag, at every level that has or implies one."""
    levels = list(config_levels(config))
    # Clearing the flag would take the scaling away, which changes the forward pass.
    if any(level.get("model_type") in SCALED_WHEN_TIED for _, level in levels):
        return {}
    return {
        f"{path}.tie_word_embeddings".lstrip("."): False
        for path, level in levels
        if not path or "tie_word_embeddings" in level or "vocab_size" in level
    }
