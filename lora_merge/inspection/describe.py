"""An adapter's headers → its description, and a report for each engine."""

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
"""The point in a tensor's name where the module's path ends and the method's own name begins."""

_SHOWN = (READ_FIELDS | UNMERGEABLE_FIELDS.keys()) - {"peft_type", "r", "lora_alpha", "target_modules"}

_USUAL = (("bias", "none"), ("init_lora_weights", True))
"""Values of settings that are not worth showing."""

FRAMEWORKS: Mapping[str, tuple[str, ...]] = {
    "Unsloth": ("unsloth",),
    "Axolotl": ("axolotl",),
    "LLaMA-Factory": ("llama-factory", "llamafactory"),
    "TRL": ("trl", "sft", "dpo", "grpo"),
}
"""Trainer → the tags that it writes into model cards. The order counts: Unsloth's cards name TRL too."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Everything about an adapter that is not in its headers. The caller has read the files."""

    named: str
    """The adapter as the user named it."""

    files: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    """Tags of its model card."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Content of ms-swift's ``args.json``."""

    manifest: Mapping[str, Any] = field(default_factory=dict)
    """The manifest of an adapter that lora-merge converted."""

    base: str = ""
    """The base as the user named it; empty if none was named."""

    options: str = ""
    """Options about the base, as a command line has them: `` --base DIR``."""

    family: BaseFamily = field(default_factory=BaseFamily)
    """The base's family, as far as its config or the adapter's tells."""

    added_tokens: int = 0
    """How many entries of the adapter's ``added_tokens.json`` may have ids beyond the base's vocabulary."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Facts that need the base."""

    modules: frozenset[str] = frozenset()
    """Every module of the base that has a matrix."""

    unchanged: frozenset[str] = frozenset()
    """Whole parameters in the adapter that only copy the base's."""

    norms: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Path → ‖Δ‖ and ‖W‖, Frobenius norms."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    storages: Mapping[str, str] = field(default_factory=dict)
    """Path → how the base stores the weight, in words. Of a module in several stored weights, the first one's."""

    storage_counts: Mapping[str, int] = field(default_factory=dict)
    """The same words → how many weights of the base are stored so."""

    stacked: Sequence[Delta] = ()
    """LoRA on ``target_parameters``, one delta for each. Only the base tells the names of these parameters."""


def inspection(
    adapter: Adapter,
    around: Surroundings,
    issues: Sequence[Issue],
    measured: Measured | None = None,
    engines: Sequence[str] = (),
) -> Inspection:
    """Return the description of an adapter.

    Args:
        adapter: from its headers.
        around: the files and options around it.
        issues: those that a merge would report.
        measured: facts from its base; None without a base.
        engines: the engines to report on.
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
        storages=measured.storage_counts if measured is not None else {},
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
    traits = traits_of(adapter, measured.modules, measured.unchanged, around.added_tokens)
    return tuple(report(name, traits, around.named, around.options, around.family) for name in engines)


def _modules(adapter: Adapter, measured: Measured) -> tuple[ModuleFacts, ...]:
    """Return every module that the adapter changes, layer 9 before layer 10."""
    found: dict[str, ModuleFacts] = {}
    named = [(delta.module, delta) for delta in adapter.deltas]
    named += [(delta.parameter, delta) for delta in measured.stacked]
    for path, delta in named:
        # The first delta has the factors; a bias of lora_B comes after it.
        if path not in found:
            found[path] = _of_delta(path, delta)
    # Without a base, the order of nesting is all that tells stacked parameters apart.
    if not measured.stacked:
        for pair in adapter.stacked:
            path = f"{pair.module}{'.base_layer' * pair.depth}"
            found[path] = ModuleFacts(
                path, StackedFacts().algebra, 0, None, (), _nbytes(pair.tensors.values())
            )
    own = {ref.name for delta in adapter.deltas for ref in delta.factors.values()}
    for path, refs in _by_peft_layers(adapter, own).items():
        found.setdefault(
            path, ModuleFacts(path, adapter.kind, 0, None, measured.shapes.get(path, ()), _nbytes(refs))
        )
    for parameter, one in adapter.replacements.items():
        found.setdefault(parameter, ModuleFacts(parameter, "whole", 0, None, one.ref.shape, one.ref.nbytes))
    ordered = sorted(found.values(), key=lambda one: _natural(one.path))
    return tuple(_with_norms(one, measured) for one in ordered)


def _with_norms(facts: ModuleFacts, measured: Measured) -> ModuleFacts:
    """Return a module's facts with what only its base tells."""
    delta, weight = measured.norms.get(facts.path, (None, None))
    storage = measured.storages.get(facts.path.removesuffix(".weight"), "")
    return replace(facts, delta_norm=delta, weight_norm=weight, storage=storage)


def _of_delta(path: str, delta: Delta) -> ModuleFacts:
    nbytes = _nbytes(delta.factors.values())
    if not isinstance(delta.facts, FactorFacts):
        ref = next(iter(delta.factors.values()))
        return ModuleFacts(path, delta.algebra, 0, None, ref.shape, nbytes)
    # B is [out, r], A is [r, in, *kernel].
    shape = (delta.shape("B")[0], *delta.shape("A")[1:])
    if delta.facts.stack is not None:
        shape = (delta.facts.stack.experts, *shape)
    return ModuleFacts(path, delta.algebra, delta.rank, delta.effective_scale, shape, nbytes)


def _by_peft_layers(adapter: Adapter, own: set[str]) -> dict[str, list[TensorRef]]:
    """Return module → tensors of a method that PEFT's own layers merge; ``(shared)`` for tensors of no module."""
    found: dict[str, list[TensorRef]] = {}
    for name, ref in adapter.peft_layers.items():
        if name in own:
            continue
        path = (
            _TUNER.split(name.removeprefix(PREFIX), maxsplit=1)[0] if name.startswith(PREFIX) else "(shared)"
        )
        if path == name.removeprefix(PREFIX):
            # No name of a method in it: the last part is the tensor's own.
            path = path.rpartition(".")[0]
        found.setdefault(path, []).append(ref)
    return found


def _nbytes(refs: Any) -> int:
    return sum(ref.nbytes for ref in refs)


def _targets(adapter: Adapter) -> str:
    """Return ``target_modules`` in words."""
    targets = adapter.config.get("target_modules")
    if isinstance(targets, list):
        return ", ".join(sorted(map(str, targets)))
    if targets is None:
        return "PEFT's own for the family (null)" if adapter.deltas and adapter.format == "peft" else ""
    return str(targets)


def _framework(adapter: Adapter, around: Surroundings) -> str:
    """Return the trainer, as far as files, tags or the name of the base tell; empty if they do not."""
    # The file with arguments is ms-swift's.
    if adapter.trainer or around.arguments:
        return adapter.trainer or "ms-swift"
    if adapter.format == "mlx":
        return "mlx-lm"
    tags = {tag.lower() for tag in around.tags}
    for name, words in FRAMEWORKS.items():
        if tags & set(words):
            return name
    base = str(adapter.config.get("base_model_name_or_path") or "")
    # Unsloth publishes copies of models under its own name, and trains on those.
    return "Unsloth" if base.startswith("unsloth/") else ""


def _provenance(adapter: Adapter, around: Surroundings) -> dict[str, str]:
    """Return label → text: the base, versions and settings of the training, and earlier conversions."""
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
    """Return a sort key that puts layer 9 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
