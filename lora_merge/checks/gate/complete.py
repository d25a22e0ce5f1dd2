"""Has every parameter of the model a tensor? vLLM and LMDeploy do not ask, and serve what is at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error, note
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.plain_config import fetched_part

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.checkpoint import Output
    from lora_merge.core.report import Issue


def complete(output: Output) -> Iterator[Issue]:
    """Yield each parameter of transformers' model that the stored tensors leave without a value.

    Nothing is said of models that transformers has no class for, and that is said where a part of the model would have to be
    fetched. Imports transformers (seconds).
    """
    part = fetched_part(output.config or {})
    if part is not None:
        sentence = (
            f"{part}; nothing is fetched for it, so whether every parameter has a tensor was not looked at"
        )
        yield note("not-fetched", CONFIG_FILE, sentence)
        return
    conversion = Conversion.of(output.config or {})
    if conversion is None:
        return
    shapes = {name: ref.shape for name, ref in output.tensors().items()}
    for parameter, why in conversion.missing(shapes).items():
        sentence = f"the model has this parameter, and {why}"
        hint = "engines leave such a one at random without a word; fetch the base again, and merge again"
        yield error("missing-parameter", parameter, sentence, hint)
