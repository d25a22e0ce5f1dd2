"""LoRA on ``target_parameters``: which parameter a pair belongs to, and how its experts lie on disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.adapter import DeltaSpec
from lora_merge.core.report import Issue, error
from lora_merge.core.scaling import Scaling
from lora_merge.core.targets import is_listed
from lora_merge.core.tensor import Region, shape_text

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter, StackedPair
    from lora_merge.core.skeleton import Skeleton
    from lora_merge.core.tensor import TensorRef


def stacked_delta(
    pair: StackedPair,
    adapter: Adapter,
    sources: Mapping[str, TensorRef],
    skeleton: Callable[[], Skeleton | None],
) -> tuple[DeltaSpec | None, list[Issue]]:
    """Return the delta of a pair of ``target_parameters``, or why there is none.

    Raises:
        TargetError: a field has a value that PEFT could not use.

    Reference:
        ``peft.tuners.lora.layer.ParamWrapper`` and ``peft.tuners.tuners_utils.BaseTuner._inject_parameters``
        (PEFT 0.21.2).
    """
    parameter = _parameter(pair, adapter, skeleton)
    if parameter is None or parameter not in sources:
        return None, [_nameless(pair, parameter, known=skeleton() is not None)]
    shape = sources[parameter].shape
    n_experts = shape[0] if len(shape) == 3 else 1
    rank, rest = divmod(pair.tensors["A"].shape[0], n_experts)
    if rest or rank == 0 or len(shape) not in {2, 3}:
        return None, [_misfit(parameter, shape, pair)]
    scale, issues = Scaling(adapter.config).of(parameter, rank)
    delta = DeltaSpec("low_rank", parameter, pair.tensors, scale, rounded=True)
    if len(shape) == 2:
        fits = (pair.tensors["B"].shape[0], pair.tensors["A"].shape[1]) == shape
        return (delta, issues) if fits else (None, [*issues, _misfit(parameter, shape, pair)])
    transposed = _orientation(pair, shape, adapter, skeleton)
    if transposed is None:
        return None, [*issues, _undecided(parameter, shape, pair, adapter)]
    region, options = Region(transposed=transposed), {"experts": n_experts}
    return replace(delta, kind="stacked", region=region, options=options), issues


def _parameter(pair: StackedPair, adapter: Adapter, skeleton: Callable[[], Skeleton | None]) -> str | None:
    """Return the parameter of a pair; PEFT wraps those of one module in their order, the last outermost."""
    entries = [str(entry) for entry in adapter.config.get("target_parameters") or ()]
    names = {
        entry.rpartition(".")[2] for entry in entries if is_listed(pair.module, (entry.rpartition(".")[0],))
    }
    if len(names) == 1:
        return f"{pair.module}.{next(iter(names))}"
    known = skeleton()
    ordered = [name for name in known.parameters.get(pair.module, ()) if name in names] if known else []
    if len(ordered) != len(names) or pair.depth >= len(ordered):
        return None
    return f"{pair.module}.{ordered[len(ordered) - 1 - pair.depth]}"


def _orientation(
    pair: StackedPair, shape: tuple[int, ...], adapter: Adapter, skeleton: Callable[[], Skeleton | None]
) -> bool | None:
    """Return True for experts ``[in, out]``, False for ``[out, in]``, None when nothing tells.

    Shapes tell nearly always. Where an expert is square, a module that PEFT calls transposed is; any other was
    ``[in, out]`` to PEFT before 0.19 and ``[out, in]`` after (huggingface/peft#3165); which 0.19.0 did is in dispute.
    """
    product = (pair.tensors["B"].shape[0], pair.tensors["A"].shape[1])
    straight, turned = product == shape[1:], product[::-1] == shape[1:]
    if straight != turned:
        return turned
    if not straight:
        return None
    known = skeleton()
    if known is not None and pair.module in known.transposed:
        return True
    version = re.match(r"(\d+)\.(\d+)\.(\d+)", str(adapter.config.get("peft_version") or ""))
    number = tuple(int(part) for part in version.groups()) if version and known else (0, 19, 0)
    return None if number == (0, 19, 0) else number < (0, 19, 0)


def _nameless(pair: StackedPair, parameter: str | None, *, known: bool) -> Issue:
    """Return the issue of a pair whose parameter is not known, or not there."""
    if parameter is not None:
        sentence = f"the adapter changes it, the base has no {parameter}"
        return error("unmatched-module", pair.module, sentence)
    if known:
        sentence = (
            "has LoRA on several parameters, and some of those that target_parameters names are not there"
        )
        return error("unmatched-target", pair.module, sentence, "the config does not belong to these tensors")
    sentence = "has LoRA on several parameters, and which pair is whose depends on the model's code"
    hint = "transformers has no class for this model; merge it with PEFT"
    return error("unsupported", pair.module, sentence, hint)


def _misfit(parameter: str, shape: tuple[int, ...], pair: StackedPair) -> Issue:
    a, b = shape_text(pair.tensors["A"].shape), shape_text(pair.tensors["B"].shape)
    sentence = f"lora_A is {a}, lora_B is {b}, the parameter is {shape_text(shape)}"
    return error("shape-mismatch", parameter, sentence, "the adapter was trained on another model")


def _undecided(parameter: str, shape: tuple[int, ...], pair: StackedPair, adapter: Adapter) -> Issue:
    """Return the issue of experts that fit neither way, or both."""
    if {pair.tensors["B"].shape[0], pair.tensors["A"].shape[1]} != set(shape[1:]):
        return _misfit(parameter, shape, pair)
    version = adapter.config.get("peft_version")
    sentence = (
        f"its experts are square, {shape_text(shape)}, and PEFT changed their orientation in 0.19; "
        f"the adapter's peft_version is {version!r}"
    )
    hint = "write the peft_version of training into adapter_config.json"
    return error("ambiguous-orientation", parameter, sentence, hint)
