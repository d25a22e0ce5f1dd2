"""LoRA on ``target_parameters``: which parameter a pair of factors changes, and how its experts are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.adapter import Delta, PlacedDelta
from lora_merge.core.facts import Facts
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import Region, shape_text
from lora_merge.deltas import LowRankFacts, Stack, StackedFacts
from lora_merge.layouts import LayoutError, Located, Place, Shape
from lora_merge.peft_rules.hints import OTHER_CONFIG, OTHER_MODEL
from lora_merge.peft_rules.kinds import peft_version
from lora_merge.peft_rules.scaling import Scaling
from lora_merge.peft_rules.targets import is_listed
from lora_merge.planning.model import misplaced
from lora_merge.planning.packing import packing_of
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.adapter import Adapter, AdapterUse, StackedPair
    from lora_merge.modeling.pieces import Box
    from lora_merge.planning.model import Model


@dataclass(frozen=True, slots=True)
class JoinedPair:
    """What became of one pair: its deltas, or what keeps it from having any."""

    deltas: tuple[PlacedDelta, ...] = ()
    issues: tuple[Issue, ...] = ()
    parameter: str = ""
    """Under the adapter's names; empty when it is not known."""

    located: Located | None = None


def stacked_deltas(
    pair: StackedPair, use: AdapterUse, n: int, model: Model, expert_layout: Collection[str]
) -> JoinedPair:
    """Return the deltas of a pair of ``target_parameters``, one per stored tensor, or the issues that prevent them.

    Args:
        pair: the factors.
        use: the adapter that they are from.
        n: which of the plan's adapters it is.
        model: the base.
        expert_layout: what the user says of experts: ``out-in``, ``in-out``, ``unsloth``.

    Raises:
        TargetError: a field has a value that PEFT could not use.

    Reference:
        ``peft.tuners.lora.layer.ParamWrapper`` and ``peft.tuners.tuners_utils.BaseTuner._inject_parameters``
        (PEFT 0.21.2).
    """
    adapter = use.adapter
    parameter = _parameter(pair, adapter, model)
    try:
        located = model.locate(parameter, None) if parameter else None
    except LayoutError as exc:
        return JoinedPair(issues=(misplaced(parameter or pair.module, exc),))
    if parameter is None or located is None or located.shape is None:
        return JoinedPair(issues=(_nameless(pair, parameter, known=model.skeleton is not None),))
    shape = located.shape
    # PEFT has one A for all experts, r rows for each.
    n_experts = shape[0] if len(shape) == 3 else 1
    rank, rest = divmod(pair.tensors["A"].shape[0], n_experts)
    if rest or rank == 0 or len(shape) not in {2, 3}:
        return JoinedPair(issues=(_misfit(parameter, shape, pair),))
    scale, issues = Scaling(adapter.config).of(parameter, rank)
    where: list[_Where]
    if len(shape) == 2:
        fits = (pair.tensors["B"].shape[0], pair.tensors["A"].shape[1]) == shape
        where = [(place, LowRankFacts(), place.transposed, place.part) for place in located.places if fits]
        problem = _misfit(parameter, shape, pair)
    else:
        # B's columns look the same either way, so only the format or the user can tell.
        packing = pair.packing or packing_of(adapter, expert_layout)
        stack = Stack(n_experts, packing)
        where = _experts_places(parameter, stack, pair, located, adapter, model, expert_layout)
        problem = _undecided(parameter, shape, pair, adapter)
    deltas = tuple(
        # Rounded: PEFT adds these in the weight's dtype.
        Delta(parameter, facts, pair.tensors, scale, rounded=True).placed(
            place.tensor,
            Region(transposed, place.at),
            part=part,
            adapter=n,
            adapter_weight=use.weight,
            rule=located.rule,
        )
        for place, facts, transposed, part in where
    )
    found = issues if deltas else [*issues, problem]
    return JoinedPair(deltas, tuple(found), parameter, located)


_Where = tuple[Place, Facts, bool, tuple[tuple[int, int], ...]]
"""Where a pair belongs, its facts there, whether the weight is stored ``[in, out]``, and which part it is."""


def _experts_places(
    parameter: str,
    stack: Stack,
    pair: StackedPair,
    located: Located,
    adapter: Adapter,
    model: Model,
    expert_layout: Collection[str],
) -> list[_Where]:
    """Return where stacked experts are stored, one entry per tensor; empty where their orientation is unknown."""
    assert located.shape is not None
    where: list[_Where] = []
    for place in located.places:
        across = _is_across(parameter, pair, place, located.shape, adapter, model, expert_layout)
        if across is None:
            return []
        is_stack = len(model.source(place.tensor).shape) == 3  # a tensor with two axes is one expert
        box: Box = place.part or (() if is_stack else tuple((0, size) for size in located.shape))
        # A part is in the adapter's axes, [expert, out, in].
        part = (box[0], box[2], box[1]) if box and across else box
        facts = StackedFacts(stack=stack) if is_stack else LowRankFacts(stack=stack)
        where.append((place, facts, across != place.transposed, part))
    return where


def _parameter(pair: StackedPair, adapter: Adapter, model: Model) -> str | None:
    """Return the parameter of a pair; None where it is unknown."""
    if pair.parameter:
        return f"{pair.module}.{pair.parameter}"
    # An entry without a path means every module that has a parameter of this name.
    split = [str(entry).rpartition(".") for entry in adapter.config.get("target_parameters") or ()]
    own = {name for owner, _, name in split if owner and is_listed(pair.module, (owner,))}
    names = own | {name for owner, _, name in split if not owner}
    if len(names) == 1:
        return f"{pair.module}.{next(iter(names))}"
    known = model.skeleton
    ordered = (
        [name for name in known.parameters.get(_home(pair, names, model), ()) if name in names]
        if known
        else []
    )
    if not own <= set(ordered) or pair.depth >= len(ordered):
        return None
    # PEFT wraps the parameters of one module in the order of their registration, so the last is outermost (depth 0).
    return f"{pair.module}.{ordered[len(ordered) - 1 - pair.depth]}"


def _home(pair: StackedPair, names: Collection[str], model: Model) -> str:
    """Return the module of a pair by the name that transformers' model has for it."""
    known = model.skeleton
    if known is None or pair.module in known.classes or not names:
        return pair.module
    conversion = model.stored.conversion
    assert conversion is not None
    homes = (conversion.canonical(f"{pair.module}.{name}")[0].rpartition(".")[0] for name in sorted(names))
    return next((home for home in homes if home in known.classes), pair.module)


def _is_across(
    parameter: str,
    pair: StackedPair,
    place: Place,
    shape: Shape,
    adapter: Adapter,
    model: Model,
    expert_layout: Collection[str],
) -> bool | None:
    """Return True where a weight has experts ``[in, out]``, False for ``[out, in]``, None where nothing tells."""
    product = (pair.tensors["B"].shape[0], pair.tensors["A"].shape[1])
    # Shapes tell, unless an expert is square.
    straight, turned = product == shape[1:], product[::-1] == shape[1:]
    if straight != turned or not straight:
        return turned if straight != turned else None
    said = next((layout for layout in ("out-in", "in-out") if layout in expert_layout), None)
    if said is not None:
        return (said == "in-out") != place.transposed
    return _is_across_by_class(parameter, pair, place, adapter, model)


def _is_across_by_class(
    parameter: str, pair: StackedPair, place: Place, adapter: Adapter, model: Model
) -> bool | None:
    """Return True where a module's square experts are ``[in, out]``, by its class and PEFT's release; None if
    unknown.
    """
    known, conversion = model.skeleton, model.stored.conversion
    if known is None or conversion is None:
        return None
    target, pattern = conversion.canonical(place.tensor)
    # transformers transposes such experts by their shape, so a square one does not show how it is stored.
    if conversion.is_turned_by_shape(pattern):
        return None
    if conversion.shape(target) is None:  # an expert of a copy that has them one by one
        target, _ = conversion.canonical(parameter)
    if pair.inward:
        return target.rpartition(".")[0] not in known.transposed
    if target.rpartition(".")[0] in known.transposed:
        return True
    # Any module that PEFT does not call transposed was [in, out] to it before 0.19 and is [out, in] since
    # (huggingface/peft#3165). What 0.19.0 itself did is in dispute.
    number = peft_version(adapter.config) or (0, 19, 0)
    return None if number == (0, 19, 0) else number < (0, 19, 0)


def _nameless(pair: StackedPair, parameter: str | None, *, known: bool) -> Issue:
    """Return the issue of a pair whose parameter is not known, or is not in the base."""
    if parameter is not None:
        sentence = f"the adapter changes this parameter, and the base has no {parameter}"
        return error(
            "unmatched-module", pair.module, sentence, "check --base: the adapter belongs to another model"
        )
    if known:
        sentence = "has LoRA on several parameters, and target_parameters names some that do not exist"
        return error("unmatched-target", pair.module, sentence, OTHER_CONFIG)
    sentence = (
        "has LoRA on several parameters, and only the model's code shows which pair belongs to which "
        "parameter"
    )
    hint = "merge it with PEFT: transformers has no class for this model"
    return error("unsupported", pair.module, sentence, hint)


def _misfit(parameter: str, shape: tuple[int, ...], pair: StackedPair) -> Issue:
    a, b = shape_text(pair.tensors["A"].shape), shape_text(pair.tensors["B"].shape)
    sentence = f"lora_A is {a}, lora_B is {b}, the parameter is {shape_text(shape)}"
    return error("shape-mismatch", parameter, sentence, OTHER_MODEL)


def _undecided(parameter: str, shape: tuple[int, ...], pair: StackedPair, adapter: Adapter) -> Issue:
    """Return the issue of experts that fit neither orientation, or both."""
    if {pair.tensors["B"].shape[0], pair.tensors["A"].shape[1]} != set(shape[1:]):
        return _misfit(parameter, shape, pair)
    version = adapter.config.get("peft_version")
    sentence = (
        f"its experts are square, {shape_text(shape)}, so their layout cannot be detected (PEFT changed it "
        f"in 0.19; the adapter's peft_version is {quoted(version)})"
    )
    hint = (
        "pass --expert-layout out-in or --expert-layout in-out, as the base stores an expert; or add the "
        "peft_version of the training to adapter_config.json"
    )
    return error("ambiguous-orientation", parameter, sentence, hint)
