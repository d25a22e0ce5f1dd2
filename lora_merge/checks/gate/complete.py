"""Does every parameter of the model have a tensor? vLLM and LMDeploy do not check, and serve random values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.checks.gate.parts import grouped
from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import error, note
from lora_merge.formats.written_checkpoint import weight_map
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.dense_families import is_whole
from lora_merge.modeling.plain_config import fetched_part
from lora_merge.quantised.mlx import is_mlx, named_by_mlx
from lora_merge.quantised.tables import settings_of
from lora_merge.runtime.packages import problem_of
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Issue
    from lora_merge.formats.written_checkpoint import Output


def complete(output: Output) -> Iterator[Issue]:
    """Yield an issue for each parameter of transformers' model that the stored tensors do not fill.

    Models that transformers has no class for are passed over. Where a part of the model would have to be fetched, a
    note says so. transformers is imported, which takes seconds, unless the tensors are those of a common decoder.
    """
    if not _is_plainly_whole(output):
        yield from _by_transformers(output)


def _by_transformers(output: Output) -> Iterator[Issue]:
    """Yield an issue for each parameter that transformers' model has and the stored tensors do not fill, or why it is not
    known.
    """
    part = fetched_part(output.config or {})
    if part is not None:
        sentence = f"not checked whether every parameter has a tensor: {part}, and nothing is downloaded for this check"
        yield note("not-fetched", CONFIG_FILE, sentence)
        return
    problem = problem_of("transformers")
    if problem:
        sentence = (
            f"checking that every parameter has a tensor needs transformers{problem}; it was not checked"
        )
        yield note("not-checked", CONFIG_FILE, sentence)
        return
    conversion = Conversion.of(output.config or {})
    if conversion is None:
        return
    coded = any(module.codes is not None for module in grouped(output.tensors()).values())
    if output.faults or (coded and not output.quantised):
        sentence = (
            "not checked whether every parameter has a tensor: the quantisation of the weights is not known"
        )
        yield note("not-identified", CONFIG_FILE, sentence)
        return
    lost = _lost(output)
    if lost or any(name.endswith(".safetensors") for name in output.broken):
        # An error by itself, of which missing parameters would only be the consequence.
        which = listing(lost or sorted(output.broken))
        sentence = f"not checked whether every parameter has a tensor: {which} is missing or cannot be read"
        yield note("not-read", CONFIG_FILE, sentence)
        return
    shapes, config = {name: weight.shape for name, weight in output.weights().items()}, output.config or {}
    odd = named_by_mlx(shapes, config) if is_mlx(settings_of(config, {})) else ""
    if odd:
        sentence = (
            "only mlx-lm has this name or layout; it was not checked whether every parameter has a tensor"
        )
        yield note("not-checked", odd, sentence)
        return
    for parameter, why in conversion.missing(shapes).items():
        sentence = f"the model has this parameter, but {why}"
        hint = "download the base again, and merge again: engines fill a missing parameter with random numbers, without an error"
        yield error("missing-parameter", parameter, sentence, hint)


def _lost(output: Output) -> list[str]:
    """Return the names of files that the index names and that are not there."""
    return sorted({str(file) for file in weight_map(output.index).values()} - output.files.keys())


def _is_plainly_whole(output: Output) -> bool:
    """Return True when the stored tensors are all parameters of a common decoder, and nothing is odd about the files."""
    config = output.config or {}
    if output.faults or output.broken or _lost(output) or is_mlx(settings_of(config, {})):
        return False
    return is_whole(config, {name: weight.shape for name, weight in output.weights().items()})
