"""Is every linear layer quantised that the settings do not leave dense? Engines would look for its scales."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.gate.parts import grouped
from lora_merge.checks.gate.scheme import Scheme
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error, note
from lora_merge.modeling.skeleton import build_skeleton
from lora_merge.runtime.packages import problem_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output


def linear(output: Output) -> Iterator[Issue]:
    """Yield an issue for each dense linear layer that the settings do not except, where they are for all linear layers.

    Models that transformers has no class for are passed over. Imports transformers, which takes seconds.
    """
    scheme = Scheme.of(output)
    if not _is_for_all(scheme):
        return
    modules = grouped(output.tensors())
    if not any(module.codes is not None for module in modules.values()):
        return
    problem = problem_of("transformers")
    if problem:
        sentence = (
            f"checking that every linear layer is quantised needs transformers{problem}; it was not checked"
        )
        yield note("not-checked", CONFIG_FILE, sentence)
        return
    skeleton = build_skeleton(output.config or {})
    if skeleton is None:
        return
    for module in modules.values():
        is_linear = skeleton.classes.get(module.name) == "Linear" and module.name != skeleton.output_embedding
        if is_linear and module.dense is not None and not module.parts and not scheme.excepts(module.name):
            sentence = "is a linear layer in full precision, but the settings say that all linear layers are quantised"
            hint = "add it to the list of modules that are not quantised: engines would look for its scales"
            yield error("not-excepted", module.name, sentence, hint)


def _is_for_all(scheme: Scheme) -> bool:
    """Return True where the settings are for every linear layer that they do not except."""
    if "compressed-tensors" in scheme.methods:
        return any("Linear" in targets for targets in scheme.targets)
    return "fp8" in scheme.methods
