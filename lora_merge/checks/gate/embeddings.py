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
    from lora_merge.core.tensor import TensorRef
    from lora_merge.formats.written_checkpoint import Output


def embeddings(output: Output) -> Iterator[Issue]:
    """Yield an issue for each embedding whose rows are not ``vocab_size``, and for a tie that the tensors contradict."""
    # Bytes of packed codes have other numbers of rows than the embedding.
    matrices = [
        ref
        for ref in output.tensors().values()
        if ref.name.endswith(".weight") and len(ref.shape) == 2 and ref.dtype != "U8"
    ]
    inputs = [ref for ref in matrices if owner_name(ref.name) in INPUT_NAMES]
    heads = [ref for ref in matrices if owner_name(ref.name) in OUTPUT_NAMES - {"decoder", "proj_out"}]
    yield from _sizes(output.config or {}, [*inputs, *heads])
    yield from _ties(output.config or {}, inputs, heads)


def _sizes(config: Mapping[str, object], refs: list[TensorRef]) -> Iterator[Issue]:
    sizes = {
        level["vocab_size"] for _, level in config_levels(config) if isinstance(level.get("vocab_size"), int)
    }
    for ref in refs:
        if sizes and ref.shape[0] not in sizes:
            counted = " or ".join(map(str, sorted(map(int, sizes))))
            sentence = f"has {ref.shape[0]} rows, expected {counted}, the vocab_size in config.json"
            hint = "engines size the embedding by vocab_size: it has to be the number of rows"
            yield error("vocabulary", ref.name, sentence, hint)


def _ties(config: Mapping[str, object], inputs: list[TensorRef], heads: list[TensorRef]) -> Iterator[Issue]:
    """Yield an issue where the configuration states a tie, and both ends are stored with different values.

    LMDeploy follows the flag and leaves the head out, as vLLM did for long; transformers looks at the tensors.
    """
    levels = [level for _, level in config_levels(config)]
    if len(inputs) != 1 or len(heads) != 1 or not any(level.get("tie_word_embeddings") for level in levels):
        return
    (embedding,), (head,) = inputs, heads
    # Compared by digests: matrices of gigabytes are read once, in blocks.
    if embedding.shape == head.shape and embedding.dtype == head.dtype:
        if tensor_digest(embedding) == tensor_digest(head):
            return
    elif embedding.shape != head.shape:
        return
    sentence = f"differs from {embedding.name}, and config.json says that they are tied: engines that go by it leave this one out"
    if any(level.get("model_type") in SCALED_WHEN_TIED for level in levels):
        yield warning("tied-apart", head.name, sentence, "transformers reads both; other engines may not")
    else:
        yield error("tied-apart", head.name, sentence, "set tie_word_embeddings to false, at every level")
