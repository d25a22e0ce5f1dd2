"""Do the embeddings have the configuration's number of rows, and the tie that it states?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import (
    INPUT_NAMES,
    OUTPUT_NAMES,
    SCALED_WHEN_TIED,
    config_levels,
    owner_name,
)
from lora_merge.core.report import error, warning
from lora_merge.formats.safetensors import tensor_digest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.core.report import Issue
    from lora_merge.core.weight import Weight
    from lora_merge.formats.written_checkpoint import Output


def embeddings(output: Output) -> Iterator[Issue]:
    """Yield an issue for each embedding whose rows are not ``vocab_size``, and for a tie that the tensors contradict."""
    # Bytes of packed codes have other numbers of rows than the embedding.
    matrices = [
        one for one in output.weights().values() if one.name.endswith(".weight") and len(one.shape) == 2
    ]
    inputs = [one for one in matrices if owner_name(one.name) in INPUT_NAMES]
    heads = [one for one in matrices if owner_name(one.name) in OUTPUT_NAMES - {"decoder", "proj_out"}]
    yield from _sizes(output.config or {}, [*inputs, *heads])
    yield from _ties(output.config or {}, inputs, heads)


def _sizes(config: Mapping[str, object], weights: list[Weight]) -> Iterator[Issue]:
    sizes = {
        level["vocab_size"] for _, level in config_levels(config) if isinstance(level.get("vocab_size"), int)
    }
    for weight in weights:
        if sizes and weight.shape[0] not in sizes:
            counted = " or ".join(map(str, sorted(map(int, sizes))))
            sentence = f"has {weight.shape[0]} rows, expected {counted} (vocab_size in config.json)"
            hint = "set vocab_size to the number of rows: engines size the embedding by it"
            yield error("vocabulary", weight.name, sentence, hint)


def _ties(config: Mapping[str, object], inputs: list[Weight], heads: list[Weight]) -> Iterator[Issue]:
    """Yield an issue where the configuration states a tie, and both ends are stored with different values.

    LMDeploy follows the flag and leaves the head out, as vLLM did for long; transformers looks at the tensors.
    """
    levels = [level for _, level in config_levels(config)]
    if len(inputs) != 1 or len(heads) != 1 or not any(level.get("tie_word_embeddings") for level in levels):
        return
    (embedding,), (head,) = inputs, heads
    # Compared by digests: matrices of gigabytes are read once, in blocks.
    if embedding.shape == head.shape and embedding.storage == head.storage:
        if _digests(embedding) == _digests(head):
            return
    elif embedding.shape != head.shape:
        return
    sentence = (
        f"differs from {embedding.name}, but config.json ties them: some engines would ignore this tensor"
    )
    if any(level.get("model_type") in SCALED_WHEN_TIED for level in levels):
        yield warning("tied-apart", head.name, sentence, "load it with transformers, which reads both")
    else:
        yield error(
            "tied-apart",
            head.name,
            sentence,
            "set tie_word_embeddings to false at every level of config.json",
        )


def _digests(weight: Weight) -> dict[str, str]:
    return {role: tensor_digest(ref) for role, ref in weight.parts.items()}
