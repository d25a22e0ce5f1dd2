"""LoRA on experts: single experts taken out of a stack, or gathered into one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.conversion.lora import Gathered, Given, LoraModule, Placed, nested
from lora_merge.core.report import Issue, error
from lora_merge.modeling.conversion import ConversionError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from lora_merge.core.adapter import Delta, PlacedDelta
    from lora_merge.modeling.conversion import Conversion
    from lora_merge.modeling.pieces import Piece
    from lora_merge.planning.joined import Joined


def split(modules: Sequence[LoraModule], joined: Joined) -> tuple[list[LoraModule], list[Issue]]:
    """Return the modules, with each stack of experts replaced by one module for each matrix that the base stores.

    Each keeps the rank and the scale of the stack. Two matrices that are one parameter of the model (gate and up) both
    get its A. A module whose base stores all experts in one tensor gives an error: its experts have no names.
    """
    found: list[LoraModule] = []
    issues: list[Issue] = []
    for module in modules:
        if module.form != "experts":
            found.append(module)
            continue
        own = [delta for delta in joined.deltas if delta.target == module.path]
        if len(module.shape) == 2:
            found.append(_by_module(module, own, joined))
        elif any(delta.facts.is_stacked or delta.region.box or not delta.part for delta in own):
            sentence = "is one tensor in the base, so its experts do not have separate names"
            hint = "pass a --base that stores each expert separately, as published"
            issues.append(error("unsupported", module.path, sentence, hint))
        else:
            found += (_expert(module, delta) for delta in own)
    return found, issues


def _by_module(module: LoraModule, own: Sequence[PlacedDelta], joined: Joined) -> LoraModule:
    """Return a matrix on ``target_parameters`` as its linear layer; unchanged where it belongs to none."""
    owner, _, parameter = module.path.rpartition(".")
    is_whole = len(own) == 1 and not (own[0].part or own[0].region.box or own[0].region.transposed)
    if parameter != "weight" or not is_whole or joined.class_of(owner) in {"Conv1D", "Embedding"}:
        return module
    return replace(module, path=own[0].tensor.removesuffix(".weight"), form="linear", depth=0)


def _expert(module: LoraModule, delta: PlacedDelta) -> LoraModule:
    """Return the LoRA of one expert's matrix: the part of the stack's factors that changes it."""
    # The part of the stack: which expert, then the two sides of its matrix.
    _, (top, bottom), (left, right) = delta.part
    shape = (bottom - top, right - left)
    turned = delta.region.transposed
    path = delta.tensor.removesuffix(".weight")
    origin = Given(delta.delta, turned, delta.part)
    return replace(
        module, path=path, form="linear", origin=origin, shape=shape[::-1] if turned else shape, depth=0
    )


def fused(modules: Sequence[LoraModule], joined: Joined) -> tuple[list[LoraModule], list[Issue]]:
    """Return the modules, with single experts gathered on the parameters that transformers' model has for them.

    Where one parameter holds several matrices (gate and up), their factors are placed side by side and the ranks add
    up. Other modules are written by parameter where PEFT would not find them by their module's name.
    """
    conversion = joined.stored.conversion
    if conversion is None:
        sentence = "transformers has no class for this model, so the layout of stacked experts is unknown"
        return list(modules), [error("unsupported", joined.base.root, sentence)]
    found: list[LoraModule] = []
    gathered: dict[str, list[Placed]] = {}
    names: set[str] = set()
    issues: list[Issue] = []
    for module in modules:
        try:
            # A copy for 4-bit training has modules that no conversion of transformers knows, so the stored
            # stack is asked first.
            parts = _slice_of(module, joined) or _parts(module, conversion)
        except ConversionError as exc:
            issues.append(error("unsupported", module.path, str(exc)))
            continue
        if parts is None:
            found.append(module)
        elif module.kept:
            sentence = "has DoRA or a bias, which LoRA on stacked experts cannot express"
            issues.append(
                error("unsupported", module.path, sentence, "pass --to-lora to convert it to plain LoRA")
            )
        else:
            names.add(module.path.rpartition(".")[2])
            for parameter, placed in parts.items():
                gathered.setdefault(parameter, []).append(placed)
    found = [_by_parameter(module, names, joined) for module in found]
    found += (_stack(parameter, parts, conversion) for parameter, parts in gathered.items())
    return found, issues


def _by_parameter(module: LoraModule, names: Collection[str], joined: Joined) -> LoraModule:
    """Return a linear layer as a parameter (``target_parameters``), where PEFT would not find it as a module.

    Reference:
        ``peft.utils.transformers_weight_conversion._convert_peft_config_moe`` (PEFT 0.21.2): any module that ends in
        ``gate_proj`` is the experts'.
    """
    assert joined.skeleton is not None
    own = [delta for delta in joined.deltas if delta.target == f"{module.path}.weight"]
    if len(own) == 1 and own[0].rule == "apart" and not own[0].region.box:  # the router of such a copy
        return replace(module, path=joined.stored.canonical(own[0].tensor), form="experts")
    path = joined.stored.module(module.path)
    is_found = module.path.rpartition(".")[2] not in names and joined.skeleton.is_adaptable(path)
    if module.form != "linear" or module.kept or is_found or path not in joined.skeleton.classes:
        return module
    return replace(module, path=f"{path}.weight", form="experts")


def renested(modules: Sequence[LoraModule], joined: Joined) -> list[LoraModule]:
    """Return modules with their depths computed for the names that they have now."""
    known = joined.skeleton.parameters if joined.skeleton else {}
    owners: dict[str, list[LoraModule]] = {}
    # Where the model does not tell the order of its parameters, the deepest stays the first.
    for module in sorted(modules, key=lambda module: -module.depth):
        if module.form == "experts":
            owners.setdefault(module.owner, []).append(module)
    parameters = {}
    for owner, own in owners.items():
        names = [module.path.rpartition(".")[2] for module in own]
        order = known.get(owner, ())
        parameters[owner] = order if set(names) <= set(order) else names
    return nested(modules, parameters)


def _parts(module: LoraModule, conversion: Conversion) -> dict[str, Placed] | None:
    """Return a module's place in each stacked parameter of the model; None when it is not part of one."""
    parameter, pattern = conversion.canonical(f"{module.path}.weight")
    shape = conversion.shape(parameter)
    if pattern is None or module.form != "linear" or shape is None or len(shape) != 3:
        return None
    if not isinstance(module.origin, Given):
        raise ConversionError("has no factors yet: convert it to plain LoRA first, then stack that")
    pieces = conversion.parts_of(f"{module.path}.weight", module.shape)
    return {target: _placed(module.origin.delta, one) for target, (one,) in pieces.items()}


def _slice_of(module: LoraModule, joined: Joined) -> dict[str, Placed] | None:
    """Return an expert's place in a stack, for a copy with experts one by one; None for other modules."""
    own = [
        delta
        for delta in joined.deltas
        if delta.target == f"{module.path}.weight" and delta.rule == "apart" and len(delta.region.box) == 3
    ]
    if not own or not isinstance(module.origin, Given):
        return None
    (delta,) = own
    (expert, _), *sides = delta.region.box
    return {
        joined.stored.canonical(delta.tensor): Placed(
            module.origin.delta, expert, sides[1 if delta.region.transposed else 0]
        )
    }


def _placed(delta: Delta, piece: Piece) -> Placed:
    experts = next(span for span in piece.spans if span.axis is None)
    outputs = next(span for span in piece.spans if span.axis == 0)
    return Placed(delta, experts.start, (outputs.start, outputs.end))


def _stack(parameter: str, parts: Iterable[Placed], conversion: Conversion) -> LoraModule:
    """Return the module of one stacked parameter. Its rank is the largest sum of ranks that an expert needs."""
    parts = tuple(sorted(parts, key=lambda part: (part.expert, part.rows)))
    ranks: dict[int, int] = {}
    for part in parts:
        ranks[part.expert] = ranks.get(part.expert, 0) + part.delta.rank
    n_experts, *sides = conversion.shape(parameter) or ()
    n_in = parts[0].delta.shape("A")[1]
    n_out = max(end for _, end in (part.rows for part in parts))
    # The last outputs may have no LoRA; the parameter's own shape says how many outputs there are.
    n_out = next((side for side in sides if side >= n_out and sorted(sides) == sorted((side, n_in))), n_out)
    return LoraModule(parameter, "experts", Gathered(parts), (n_experts, n_out, n_in), max(ranks.values()))
