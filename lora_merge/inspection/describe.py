"""An adapter's headers → what it is, and what each engine will make of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.spelling import TUNERS
from lora_merge.core.adapter import Delta
from lora_merge.deltas import FactorFacts, StackedFacts
from lora_merge.inspection.facts import Inspection, ModuleFacts
from lora_merge.peft_rules.kinds import PREFIX, READ_FIELDS, UNMERGEABLE_FIELDS
from lora_merge.serving import report
from lora_merge.serving.family import BaseFamily
from lora_merge.serving.traits import traits_of

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter
    from lora_merge.core.report import Issue
    from lora_merge.core.tensor import TensorRef
    from lora_merge.serving.engine_report import EngineReport

_TUNER = re.compile(
    rf"\.(?:{'|'.join(TUNERS)}|lora|vblora|tinylora|frod|glora|osf|peanut|psoft|ln_tuning)_?\w*(?:\.|$)"
)
"""Where the name of a module ends, and that of a method's tensor begins."""

_SHOWN = (READ_FIELDS | UNMERGEABLE_FIELDS.keys()) - {"peft_type", "r", "lora_alpha", "target_modules"}

_USUAL = (("bias", "none"), ("init_lora_weights", True))
"""Settings that say nothing."""

FRAMEWORKS: Mapping[str, tuple[str, ...]] = {
    "Unsloth": ("unsloth",),
    "Axolotl": ("axolotl",),
    "LLaMA-Factory": ("llama-factory", "llamafactory"),
    "TRL": ("trl", "sft", "dpo", "grpo"),
}
"""Tags of a model card that trainers write, in the order in which they are looked for: Unsloth's card names TRL too."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What stands around an adapter's tensors, read by whoever may open files."""

    named: str
    """The adapter as the user named it."""

    files: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """Of its model card."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """ms-swift's ``args.json``."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    """``conversion.json`` of an adapter that was converted here."""

    base: str = ""
    """The base as the user named it; empty without one."""

    options: str = ""
    """The options that name it, and what it is to the adapter, as a command line has them."""

    family: BaseFamily = field(default_factory=BaseFamily)
    """Of the base, as far as its config, or the adapter's, tells."""

    added_tokens: int = 0
    """How many entries of the adapter's ``added_tokens.json`` may have ids beyond the base's vocabulary."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What only a base can tell."""

    modules: frozenset[str] = frozenset()
    """Every module of the base that has a matrix."""

    unchanged: frozenset[str] = frozenset()
    """Whole parameters in the adapter that are but copies of the base's."""

    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By path: ‖Δ‖ and ‖W‖."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stacked: Sequence[Delta] = ()
    """LoRA on ``target_parameters``, which only the base can name; one delta for each."""


def inspection(
    adapter: Adapter,
    around: Surroundings,
    issues: Sequence[Issue],
    measured: Measured | None = None,
    engines: Sequence[str] = (),
) -> Inspection:
    """Return what an adapter is.

    Args:
        adapter: from its headers.
        around: what stands around it.
        issues: what a merge would say of it.
        measured: what its base tells; None without one.
        engines: to report on.
    """
    facts = _modules(adapter, measured or Measured())
    return Inspection(
        adapter=around.named,
        format=adapter.format,
        kind=adapter.kind,
        framework=_framework(adapter, around),
        base=around.base or str(adapter.config.get("base_model_name_or_path") or ""),
        with_base=measured is not None,
        digest=adapter.digest,
        nbytes=sum(one.nbytes for one in facts),
        targets=_targets(adapter),
        modules=facts,
        settings={
            name: str(value)
            for name, value in sorted(adapter.config.items())
            if name in _SHOWN and value and (name, value) not in _USUAL
        },
        files=around.files,
        provenance=_provenance(adapter, around),
        rank_counts=dict(sorted(Counter(one.rank for one in facts if one.rank).items())),
        engines=_engine_reports(adapter, around, engines, measured or Measured()),
        issues=tuple(issues),
    )


def _engine_reports(
    adapter: Adapter, around: Surroundings, engines: Sequence[str], measured: Measured
) -> tuple[EngineReport, ...]:
    """Return what each engine makes of an adapter."""
    traits = traits_of(adapter, measured.modules, measured.unchanged, around.added_tokens)
    return tuple(report(name, traits, around.named, around.options, around.family) for name in engines)


def _modules(adapter: Adapter, measured: Measured) -> tuple[ModuleFacts, ...]:
    """Return every module, in the order in which people count layers."""
    found: dict[str, ModuleFacts] = {}
    named = [(delta.module, delta) for delta in adapter.deltas]
    named += [(delta.parameter, delta) for delta in measured.stacked]
    for path, delta in named:
        if path not in found:  # a bias of lora_B comes after the factors of its module
            found[path] = _of_delta(path, delta)
    if not measured.stacked:
        for pair in adapter.stacked:
            path = f"{pair.module}{'.base_layer' * pair.depth}"
            found[path] = ModuleFacts(
                path, StackedFacts().algebra, 0, None, (), _nbytes(pair.tensors.values())
            )
    own = {ref.name for delta in adapter.deltas for ref in delta.factors.values()}
    for path, refs in _layered(adapter, own).items():
        found.setdefault(
            path, ModuleFacts(path, adapter.kind, 0, None, measured.shapes.get(path, ()), _nbytes(refs))
        )
    for parameter, one in adapter.replacements.items():
        found.setdefault(parameter, ModuleFacts(parameter, "whole", 0, None, one.ref.shape, one.ref.nbytes))
    ordered = sorted(found.values(), key=lambda one: _natural(one.path))
    return tuple(
        replace(one, delta_norm=measured.norms[one.path][0], weight_norm=measured.norms[one.path][1])
        if one.path in measured.norms
        else one
        for one in ordered
    )


def _of_delta(path: str, delta: Delta) -> ModuleFacts:
    nbytes = _nbytes(delta.factors.values())
    if not isinstance(delta.facts, FactorFacts):
        ref = next(iter(delta.factors.values()))
        return ModuleFacts(path, delta.algebra, 0, None, ref.shape, nbytes)
    shape = (delta.shape("B")[0], *delta.shape("A")[1:])
    if delta.facts.stack is not None:
        shape = (delta.facts.stack.experts, *shape)
    return ModuleFacts(path, delta.algebra, delta.rank, delta.effective_scale, shape, nbytes)


def _layered(adapter: Adapter, own: set[str]) -> dict[str, list[TensorRef]]:
    """Return the tensors of a method that PEFT's own layers merge, by module; shared ones under ``(shared)``."""
    found: dict[str, list[TensorRef]] = {}
    for name, ref in adapter.layered.items():
        if name in own:
            continue
        path = (
            _TUNER.split(name.removeprefix(PREFIX), maxsplit=1)[0] if name.startswith(PREFIX) else "(shared)"
        )
        if path == name.removeprefix(PREFIX):
            path = path.rpartition(".")[0]
        found.setdefault(path, []).append(ref)
    return found


def _nbytes(refs: Any) -> int:
    return sum(ref.nbytes for ref in refs)


def _targets(adapter: Adapter) -> str:
    targets = adapter.config.get("target_modules")
    if isinstance(targets, list):
        return ", ".join(sorted(map(str, targets)))
    if targets is None:
        return "PEFT's own for the family (null)" if adapter.deltas and adapter.format == "peft" else ""
    return str(targets)


def _framework(adapter: Adapter, around: Surroundings) -> str:
    """Return what trained an adapter, as far as its files tell."""
    if adapter.trainer or around.arguments:
        return adapter.trainer or "ms-swift"
    if adapter.format == "mlx":
        return "mlx-lm"
    tags = {tag.lower() for tag in around.tags}
    for name, words in FRAMEWORKS.items():
        if tags & set(words):
            return name
    base = str(adapter.config.get("base_model_name_or_path") or "")
    return "Unsloth" if base.startswith("unsloth/") else ""


def _provenance(adapter: Adapter, around: Surroundings) -> dict[str, str]:
    """Return who made an adapter, from what."""
    config, arguments, manifest = adapter.config, around.arguments, around.manifest
    found = {
        "trained on": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "saved by": f"PEFT {config['peft_version']}" if config.get("peft_version") else None,
        "ms-swift's model": arguments.get("model"),
        "template": arguments.get("template"),
    }
    if manifest:
        made_of = manifest.get("adapter") or manifest.get("tuned") or {}
        source = made_of.get("path") if isinstance(made_of, dict) else None
        done = ", ".join(map(str, manifest.get("transforms") or ())) or "nothing"
        found["converted"] = f"by lora-merge {manifest.get('lora_merge_version')} from {source}: {done}"
    return {name: str(value) for name, value in found.items() if value}


def _natural(path: str) -> list[tuple[int, str]]:
    """Return what sorts paths as people do, layer 9 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
