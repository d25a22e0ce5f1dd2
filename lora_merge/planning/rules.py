"""Disagreements between an adapter's configuration and its tensors about what is targeted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, warning
from lora_merge.peft_rules.family_targets import family_targets
from lora_merge.peft_rules.hints import DROPPED, incomplete
from lora_merge.peft_rules.loose_ends import LooseEnd
from lora_merge.peft_rules.targets import TargetRule, is_listed, listed_among
from lora_merge.planning.absent import Absent
from lora_merge.words import counted, of_several, quoted

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter
    from lora_merge.planning.model import Model
    from lora_merge.planning.spellings import Names


_SWIFT_ADAPTS = frozenset({"Linear", "Conv1D", "Embedding", "Conv2d"})
"""What ms-swift adapts of all that a regex matches (ms-swift 4.6.0, ``swift.tuners.lora_layers.dispatch_default``)."""


def rule_issues(adapter: Adapter, model: Model, names: Names) -> list[Issue]:
    """Return an issue for every disagreement about targets.

    Args:
        adapter: one adapter.
        model: the base.
        names: which of the adapter's names is which of the base's.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """
    if adapter.kind == "TRAINABLE_TOKENS":
        rule = TargetRule.parse(adapter.config)
        return _unmatched(rule, frozenset(delta.module for delta in adapter.deltas), adapter, model, names)
    modules = _by_module(adapter)
    rule = resolved_rule(adapter, model) if modules else TargetRule.parse(adapter.config)
    # Without targets PEFT would not load the adapter, so the other questions make no sense.
    if modules and rule.target_modules is None and not adapter.config.get("target_parameters"):
        return [_no_default(modules, model)]
    return [
        *_unexpected(rule, modules, adapter, model),
        *_unmatched(rule, modules, adapter, model, names),
        *_missing(rule, adapter, model, names),
        *_missing_parameters(adapter, model, names),
        *_biases(adapter, model, names),
    ]


def resolved_rule(adapter: Adapter, model: Model) -> TargetRule:
    """Return the rule of an adapter, with PEFT's own targets for the family where ``target_modules`` is null.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """
    rule = TargetRule.parse(adapter.config)
    if rule.target_modules is not None:
        return rule
    return replace(rule, target_modules=family_targets(adapter.kind, str(model.config.get("model_type"))))


def _no_default(modules: frozenset[str], model: Model) -> Issue:
    """Return the issue of null targets in a family that PEFT has no targets for."""
    sentence = (
        f"is null, and PEFT has no default targets for the family {model.config.get('model_type')!r}, so "
        f"PEFT would not load this adapter, which has tensors for {counted(len(modules), 'module')}"
    )
    last = ", ".join(sorted({f'"{module.rpartition(".")[2]}"' for module in modules}))
    hint = f"add the trained modules to target_modules in adapter_config.json, perhaps [{last}]"
    return error("bad-field", "target_modules", sentence, hint)


def _by_module(adapter: Adapter) -> frozenset[str]:
    """Return the modules that ``target_modules`` has to name: all but those of ``target_parameters``."""
    owners = {str(entry).rpartition(".")[0] for entry in adapter.config.get("target_parameters") or ()}
    stacked = {pair.module for pair in adapter.stacked}
    return frozenset(module for module in adapter.modules - stacked if not is_listed(module, owners - {""}))


def _unexpected(rule: TargetRule, modules: frozenset[str], adapter: Adapter, model: Model) -> list[Issue]:
    """Return an error for each module that has tensors and is not targeted."""
    rule.learn(modules)
    known = model.skeleton if rule.all_linear else None
    allowed = known.all_linear() if known else None
    issues = []
    for module in sorted(modules):
        # "all-linear" matches every name, so the module's class has to be asked.
        if rule.matches(module) and (allowed is None or model.module(module) in allowed):
            continue
        if adapter.config.get("ensure_weight_tying"):
            continue  # PEFT adapts the other end of a tie too, even if the targets do not name it
        is_default = adapter.config.get("target_modules") is None
        sentence = f"the adapter has tensors for it, and {_why_not(rule, module, is_default=is_default)}"
        hint = DROPPED
        issues.append(error("unexpected-tensor", module, sentence, hint))
    return issues


def _unmatched(
    rule: TargetRule, modules: frozenset[str], adapter: Adapter, model: Model, names: Names
) -> list[Issue]:
    """Return an issue for each target that matches no module of the adapter."""
    saved = {parameter.rpartition(".")[0] for parameter in adapter.replacements}
    unmatched = rule.unmatched_targets(modules | saved)
    # An entry may mean modules that the rule itself takes out again: then nothing is missing.
    if unmatched:
        unmatched = rule.unmatched_targets(modules | _left_out(rule, model, names))
    hint = "remove it from adapter_config.json if it was never trained"
    sentence = "the entry {!r} matches none of the adapter's {} modules, and the base has it"
    ends = [
        LooseEnd(
            _targets_field(adapter),
            entry,
            "unmatched-target",
            sentence.format(entry, len(adapter.modules)),
            hint,
        )
        for entry in unmatched
    ]
    entries = tuple(map(str, adapter.config.get("target_parameters") or ()))
    answered = listed_among(frozenset(entries), names.parameters) if entries else set()
    for entry in entries:
        if entry not in answered and names.has_modules(adapter.stacked):
            words = f"the entry {entry!r} matches none of the adapter's tensors, and the base has it"
            ends.append(LooseEnd("target_parameters", entry, "unmatched-target", words, hint))
    return Absent(model, names).issues(ends) if ends else []


def _targets_field(adapter: Adapter) -> str:
    """Return the field in which an adapter's own configuration lists its targets."""
    return "lora_parameters.keys" if adapter.format == "mlx" else "target_modules"


def _left_out(rule: TargetRule, model: Model, names: Names) -> frozenset[str]:
    """Return the base's modules that the rule does not match, by the adapter's names."""
    # PEFT saves "all-linear" expanded, with the modules that exclude_modules takes out again.
    stored = (name.removesuffix(".weight") for name in model.sources if name.endswith(".weight"))
    modules = tuple(map(names.in_adapter, stored))
    rule.learn(modules)
    return frozenset(module for module in modules if not rule.matches(module))


def _missing(rule: TargetRule, adapter: Adapter, model: Model, names: Names) -> list[Issue]:
    """Return an issue for each layer that the configuration targets and the adapter has no tensors for."""
    settled = adapter.modules | _rankless(adapter)
    # Matrices that nothing of the adapter touches. The head of a tie is the embedding's weight, not a layer of its
    # own.
    lacking = {
        module: own
        for name, ref in model.sources.items()
        if name.endswith(".weight") and len(ref.shape) >= 2 and name not in names.taken
        for module in [name.removesuffix(".weight")]
        for own in [names.in_adapter(module)]
        if own not in settled and not (model.tie and name == model.tie.head)
    }
    rule.learn(lacking.values())
    candidates = {module: own for module, own in lacking.items() if rule.matches(own)}
    experts = [module for module in names.absent_experts() if rule.matches(module)]
    if not candidates and not experts:
        return []
    # Only now: transformers takes seconds, and most adapters lack nothing.
    known = model.skeleton
    if known is None:
        first = next(iter(candidates))
        sentence = of_several(
            len(candidates),
            "is targeted by the config, and the adapter has no tensors for it",
            "are targeted by the config, and the adapter has no tensors for them",
        )
        hint = "transformers has no class for this model, so whether they are linear layers is unknown"
        return [warning("missing-module", first, sentence, hint)] if not rule.all_linear else []
    targeted = known.all_linear()
    sentence = "the config targets it, and the adapter has no tensors for it"
    hint = incomplete("would only warn and leave the module unchanged")
    by_swift = adapter.trainer == "ms-swift" and isinstance(rule.target_modules, str)

    def is_meant(module: str, own: str) -> bool:
        # The same module of another layer was trained, so its class need not be asked.
        if names.has_siblings(own):
            return model.knows(f"{module}.weight")
        path = model.module(module)
        if not path.startswith(model.part):
            return False
        # ms-swift's regex matches containers too, and ms-swift passes over them.
        if by_swift and known.classes.get(path) not in _SWIFT_ADAPTS:
            return False
        return path in targeted if rule.all_linear else known.is_adaptable(path)

    absent = [own for module, own in candidates.items() if is_meant(module, own)]
    return [error("missing-module", module, sentence, hint) for module in absent + experts]


def _missing_parameters(adapter: Adapter, model: Model, names: Names) -> list[Issue]:
    """Return an error for each parameter that ``target_parameters`` means and the adapter lacks.

    An entry that matches no parameter of the adapter is judged as a whole.

    Reference:
        ``peft.tuners.tuners_utils.BaseTuner._inject_parameters`` (PEFT 0.21.2).
    """
    wanted = frozenset(map(str, adapter.config.get("target_parameters") or ()))
    entries = listed_among(wanted, names.parameters) if wanted else set()
    known = model.skeleton if entries else None
    if known is None:
        return []
    sentence = "the config targets it, and the adapter has no tensors for it"
    hint = incomplete("would only warn and leave the parameter unchanged")
    parameters = (f"{path}.{name}" for path, own in known.parameters.items() for name in own)
    found = {model.stored.canonical(parameter) for parameter in names.parameters} | set(names.parameters)
    return [
        error("missing-module", parameter, sentence, hint)
        for parameter in parameters
        if is_listed(parameter, entries) and parameter not in found
    ]


def _rankless(adapter: Adapter) -> frozenset[str]:
    """Return the modules in AdaLoRA's ``rank_pattern``: one that was pruned to rank 0 may have no tensors."""
    if adapter.kind != "ADALORA":
        return frozenset()
    pattern = adapter.config.get("rank_pattern") or {}
    return frozenset(str(name).removesuffix(".default").removesuffix(".lora_E") for name in pattern)


def _biases(adapter: Adapter, model: Model, names: Names) -> list[Issue]:
    """Return an error for each bias that was trained, as the configuration says, and is not in the file."""
    kind = adapter.config.get("bias", "none")
    if kind == "none":
        return []
    if kind not in {"all", "lora_only"}:
        return [error("bad-field", "bias", f"is {quoted(kind)}, expected 'none', 'all' or 'lora_only'")]
    absent = [
        name
        for name in model.sources
        if name.endswith(".bias")
        and name not in names.taken
        and (kind == "all" or names.in_adapter(name.removesuffix(".bias")) in adapter.modules)
    ]
    hint = incomplete("would keep the base's bias without a message")
    sentence = f"the config says bias={quoted(kind)}, and the adapter has no tensor for it"
    return [error("missing-bias", name, sentence, hint) for name in absent]


def _why_not(rule: TargetRule, module: str, *, is_default: bool) -> str:
    """Return, as half a sentence, which field of a rule leaves a module out."""
    if rule.excludes(module):
        return "exclude_modules excludes it"
    if rule.all_linear:
        return 'target_modules="all-linear" does not cover it'
    if is_default and rule.target_modules:
        listed = (
            rule.target_modules
            if isinstance(rule.target_modules, str)
            else ", ".join(rule.target_modules or ())
        )
        return f"target_modules is null, so PEFT uses its default targets for this family: {listed}"
    if replace(rule, layers_to_transform=None).matches(module):
        return "layers_to_transform does not include its layer"
    return "target_modules does not match it"
