"""Is every linear layer quantised that the settings do not leave dense? Engines would look for its scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.checks.gate.parts import grouped
from lora_merge.checks.gate.scheme import Scheme
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error, note
from lora_merge.modeling.dense_families import linear_layers
from lora_merge.modeling.skeleton import build_skeleton
from lora_merge.runtime.packages import problem_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output


def linear(output: Output) -> Iterator[Issue]:
    """Yield an issue for each dense linear layer that the settings do not except, where they are for all linear layers.

    Models that transformers has no class for are passed over. It is imported, which takes seconds, only if a dense layer is
    found and the model is none of the common decoders.
    """
    scheme, config = Scheme.of(output), output.config or {}
    if not _is_for_all(scheme):
        return
    modules = grouped(output.tensors()).values()
    if not any(module.codes is not None for module in modules):
        return
    dense = [
        module.name
        for module in modules
        if module.dense is not None and not module.parts and not scheme.excepts(module.name)
    ]
    known = linear_layers(config)
    if known is not None:
        dense = [name for name in dense if name in known]
    problem = problem_of("transformers") if dense and known is None else ""
    if problem:
        sentence = (
            f"checking that every linear layer is quantised needs transformers{problem}; it was not checked"
        )
        yield note("not-checked", CONFIG_FILE, sentence)
        return
    if dense and known is None:
        known = _by_transformers(config)
    for name in dense:
        if known is not None and name in known:
            sentence = "is a linear layer in full precision, but the settings say that all linear layers are quantised"
            hint = "add it to the list of modules that are not quantised: engines would look for its scales"
            yield error("not-excepted", name, sentence, hint)


def _by_transformers(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the linear layers of transformers' model without its output embedding; None where it has no class."""
    skeleton = build_skeleton(config)
    if skeleton is None:
        return None
    linear = {name for name, kind in skeleton.classes.items() if kind == "Linear"}
    return frozenset(linear - {skeleton.output_embedding})


def _is_for_all(scheme: Scheme) -> bool:
    """Return True where the settings are for every linear layer that they do not except."""
    if "compressed-tensors" in scheme.methods:
        return any("Linear" in targets for targets in scheme.targets)
    return "fp8" in scheme.methods
