"""Does a module that PEFT's own layer merged compute the same as base and adapter, unmerged?

The adapter's forward pass is the truth, so this asks it: the layer answers to random input before and after.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lora_merge.checks.decoding import DECODERS
from lora_merge.checks.reading import Reader
from lora_merge.core.adapter import PlacedDelta
from lora_merge.core.plan import Merge
from lora_merge.core.report import error, note
from lora_merge.core.tensor import UNIT_ROUNDOFF
from lora_merge.core.weight import Weight
from lora_merge.formats.safetensors import load
from lora_merge.peft_rules.base_factors import PLAIN, parts_of
from lora_merge.peft_rules.injection import Injection, InjectionError
from lora_merge.peft_rules.kinds import PREFIX
from lora_merge.words import of_several

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lora_merge.checks.evidence import Evidence
    from lora_merge.core.report import Issue
    from lora_merge.deltas import PeftLayerFacts  # noqa: TC004 - a field's type, never evaluated

_N_ROUNDINGS = 8
"""Roundings that PEFT may make on the way to a merged value: rotations and Kronecker products have several steps."""


_SUMS = 16
"""Standard errors of a float32 sum over a row that are accepted: an unmerged layer adds up several sums on the way,
whose terms may be larger than the output (VeRA's shared projections).
"""


@dataclass(slots=True)
class _Module:
    """One module that PEFT's layer merged, before and after."""

    delta: PlacedDelta
    """The delta of one of its parameters: it has all of the adapter's tensors."""

    facts: PeftLayerFacts
    """That delta's facts: the module's name, and the configurations of model and adapter."""

    base: dict[str, Weight]
    merged: dict[str, Weight]


def layers(evidence: Evidence) -> Iterator[Issue]:
    """Yield an issue for each module whose merged output differs from that of base and adapter.

    Every output of every module is compared: each depends on one row of the weight. Weights that other adapters
    changed too are left out, since PEFT's unmerged layer has one adapter only.
    """
    injections: dict[object, Injection] = {}
    found, crowded = _modules(evidence)
    if crowded:
        why = "not recomputed: several adapters change the same tensor, and one of them uses PEFT's own layer"
        sentence = of_several(len(crowded), f"was {why}", f"were {why}")
        yield note("not-asked", min(crowded), sentence)
    for module in found:
        yield from _ask(module, injections)


def _modules(evidence: Evidence) -> tuple[list[_Module], set[str]]:
    """Return the modules that only PEFT's layer changed, and the names of those that others changed too."""
    found: dict[str, _Module] = {}
    crowded: set[str] = set()
    for step in evidence.plan.steps:
        own = [d for d in step.op.deltas if d.facts.by_peft] if isinstance(step.op, Merge) else []
        if not own or not isinstance(step.op, Merge):
            continue
        delta = own[0]
        facts = cast("PeftLayerFacts", delta.facts)
        # The unmerged layer knows only its own adapter.
        if len(step.op.deltas) > 1 or delta.adapter_weight != 1 or step.op.combination is not None:
            crowded.add(facts.module)
            continue
        base = {facts.parameter: step.op.source, **_others(delta)}
        module = found.setdefault(facts.module, _Module(delta, facts, base, dict(base)))
        written = evidence.stored_at(step.writes)
        module.merged[facts.parameter] = Weight(step.name, step.shape, step.op.target, written)
    return [module for name, module in found.items() if name not in crowded], crowded


def _others(delta: PlacedDelta) -> dict[str, Weight]:
    """Return the other parameters of a module, as the factors of a delta have them."""
    facts = cast("PeftLayerFacts", delta.facts)
    plain = {
        role.removeprefix(PLAIN): Weight.dense(ref)
        for role, ref in delta.factors.items()
        if role.startswith(PLAIN)
    }
    return plain | {
        name: Weight(name, shape, storage, parts_of(name, delta.factors))
        for name, shape, storage in facts.coded
    }


def _ask(module: _Module, injections: dict[object, Injection]) -> Iterator[Issue]:
    """Yield an issue when the two outputs differ by more than rounding explains, of weights and of float32 sums."""
    facts = module.facts
    tensors = {
        role.removeprefix("adapter:"): load(ref)
        for role, ref in module.delta.factors.items()
        if role.startswith("adapter:")
    }
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    shared = {name: tensor for name, tensor in tensors.items() if name not in own}
    why = _why_not(module)
    if why:
        yield note("not-asked", facts.module, f"was not compared with its unmerged output: {why}")
        return
    base, merged = _loaded(module.base), _loaded(module.merged)
    key = (facts.model_config, facts.adapter_config, facts.digest)
    try:
        if key not in injections:
            injections[key] = Injection(json.loads(key[0]), json.loads(key[1]), shared)
        injection, name = injections[key], facts.module
        x = _inputs(injection.example(name), base)
        # The first result is with the adapter, the second without: the merged weights run without.
        adapted, _ = injection.forward(name, base, own, x)
        _, got = injection.forward(name, merged, own, x)
        sizes = [_size(injection, name, weights, own, x) for weights in (base, merged)]
    except InjectionError as exc:
        yield note("not-asked", exc.subject, f"was not compared with its unmerged output: {exc.sentence}")
        return
    roundoff = max(UNIT_ROUNDOFF[weight.storage.value_dtype] for weight in module.merged.values())
    length = max(tensor[0].numel() if tensor.dim() else 1 for tensor in base.values())
    share = _N_ROUNDINGS * roundoff + _SUMS * length**0.5 * 2.0**-24
    off, size = (got - adapted).abs(), sizes[0].maximum(sizes[1])
    wrong = ~(off <= share * _spread(size))  # negated, so that NaN is wrong
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        sentence = (
            f"its output differs from base and unmerged adapter by {float(off[at]):.3g}, expected at most "
            f"{share * float(_spread(size)[at]):.3g} from rounding; {int(wrong.sum())} of {wrong.numel()} values are wrong"
        )
        yield error("wrong-output", facts.module, sentence)


def _inputs(example: torch.Tensor, base: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return an input that every row of the weight contributes to; for an embedding, every token."""
    import torch

    if example.is_floating_point():
        return example
    return torch.arange(max(len(tensor) for tensor in base.values()))


def _spread(size: torch.Tensor) -> torch.Tensor:
    """Return the size of each value, but at least the median: values on the way may be as large as that."""
    return size.maximum(size.median())


def _size(injection: Injection, name: str, weights: Any, own: Any, x: torch.Tensor) -> torch.Tensor:
    """Return √(Σ W²x²) for each output: what independent roundings of the weights add up to."""
    if not x.is_floating_point() or all(tensor.dim() < 2 for tensor in weights.values()):
        return injection.forward(name, weights, own, x)[1].abs()  # no sums: each output is one product
    # The layer computes this itself, with squared weights and inputs: so it holds for layers of any shape.
    squares = {parameter: tensor.square() for parameter, tensor in weights.items()}
    return injection.forward(name, squares, own, x.square())[1].abs().sqrt()


def _why_not(module: _Module) -> str:
    """Return why a module cannot be compared, as it is stored; empty where it can."""
    unknown = {weight.storage.codec for weight in module.base.values()} - DECODERS.keys()
    if unknown:
        return f"there is no second decoder for its weight's storage ({min(unknown)})"
    written = [weight for name, weight in module.merged.items() if weight != module.base[name]]
    # How far a group of values is rounded together depends on its largest.
    return "" if all(weight.storage.is_dense for weight in written) else "its merged weight is quantised"


def _loaded(weights: dict[str, Weight]) -> dict[str, torch.Tensor]:
    """Return weights in float32, decoded by code that shares nothing with the merge."""
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)

        def read(weight: Weight) -> torch.Tensor:
            n_rows = weight.shape[0] if weight.shape else 1
            values, _ = reader.weight(weight, range(n_rows), n_rows)
            return values.float().view(weight.shape)

        return {
            name: load(weight.plain).float() if weight.plain is not None else read(weight)
            for name, weight in weights.items()
        }
