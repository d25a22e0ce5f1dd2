"""Where an adapter's configuration and its tensors disagree about what is targeted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.report import Issue, error, warning
from lora_merge.core.targets import TargetRule, is_listed

if TYPE_CHECKING:
    from lora_merge.core.adapter import Adapter
    from lora_merge.core.skeleton import Skeleton
    from lora_merge.core.tensor import TensorRef
    from lora_merge.plan.ties import Tie


_SWIFT_ADAPTS = frozenset({"Linear", "Conv1D", "Embedding", "Conv2d"})
"""What ms-swift adapts of all that a regex matches (ms-swift 4.6.0, ``swift.tuners.lora_layers.dispatch_default``)."""

_OTHER_WEIGHTS_IN_MLX = {
    "falcon_h1": "multiplies the weights by the config's multipliers",
    "baichuan_m1": "divides the rows of the output embedding by their length",
    "bailing_moe": "divides the columns of the output embedding by their length",
    "bailing_moe_linear": "divides the columns of the output embedding by their length",
}
"""Families whose matrices mlx-lm 0.32 changes when it loads them, so that its deltas are not those of this base."""

_OTHER_NORMS_IN_MLX = frozenset(
    {"qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "step3p5"}
)
"""Families to whose norms mlx-lm 0.32 adds 1 when it loads them."""


def origin_issues(adapter: Adapter, config: Mapping[str, Any]) -> list[Issue]:
    """Return an issue when the weights that an adapter was trained on are not those that the base stores."""
    if adapter.format != "mlx":
        return []
    families = {str(level.get("model_type")) for _, level in config_levels(config)}
    for family in sorted(families & _OTHER_WEIGHTS_IN_MLX.keys()):
        sentence = f"is {family!r}, and mlx-lm {_OTHER_WEIGHTS_IN_MLX[family]} when it loads them"
        return [error("unsupported", "model_type", sentence, "merge it with mlx_lm.fuse")]
    norms = [parameter for parameter in adapter.replacements if "norm" in parameter]
    if norms and families & _OTHER_NORMS_IN_MLX:
        sentence = "was trained in mlx-lm, which adds 1 to the norms of this family when it loads them"
        return [error("unsupported", norms[0], sentence, "merge it with mlx_lm.fuse")]
    return []


def rule_issues(
    adapter: Adapter,
    sources: Mapping[str, TensorRef],
    skeleton: Callable[[], Skeleton | None],
    tie: Tie | None,
) -> list[Issue]:
    """Return every disagreement.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """
    rule = TargetRule.parse(adapter.config)
    if adapter.kind == "TRAINABLE_TOKENS":
        return _unmatched(rule, frozenset(delta.module for delta in adapter.deltas), adapter, sources)
    modules = _by_module(adapter)
    return [
        *_unexpected(rule, modules, adapter, skeleton),
        *_unmatched(rule, modules, adapter, sources),
        *_missing(rule, adapter, sources, skeleton, tie),
        *_biases(adapter, sources),
    ]


def _by_module(adapter: Adapter) -> frozenset[str]:
    """Return the modules that ``target_modules`` answers for: all but those of ``target_parameters``."""
    owners = {str(entry).rpartition(".")[0] for entry in adapter.config.get("target_parameters") or ()}
    return frozenset(module for module in adapter.modules if not is_listed(module, owners))


def _unexpected(
    rule: TargetRule, modules: frozenset[str], adapter: Adapter, skeleton: Callable[[], Skeleton | None]
) -> list[Issue]:
    """Return an issue for each module that has tensors and is not targeted."""
    known = skeleton() if rule.all_linear else None
    allowed = known.all_linear() if known else None
    issues = []
    for module in sorted(modules):
        if rule.matches(module) and (allowed is None or module in allowed):
            continue
        if adapter.config.get("ensure_weight_tying"):
            continue  # PEFT adapts the other end of a tie too, whatever the targets say
        sentence = f"the adapter has tensors for it, and {_why_not(rule, module)}"
        hint = "PEFT would drop these tensors without a word; the config is not the one of training"
        issues.append(error("unexpected-tensor", module, sentence, hint))
    return issues


def _unmatched(
    rule: TargetRule, modules: frozenset[str], adapter: Adapter, sources: Mapping[str, TensorRef]
) -> list[Issue]:
    """Return an issue for each target that no module of the adapter answers to."""
    issues = []
    for entry in rule.unmatched_targets(modules | _left_out(rule, sources)):
        sentence = f"the entry {entry!r} matches none of the adapter's {len(adapter.modules)} modules"
        hint = "remove it from adapter_config.json if it was never trained"
        issues.append(error("unmatched-target", "target_modules", sentence, hint))
    for entry in adapter.config.get("target_parameters") or ():
        owner = str(entry).rpartition(".")[0]
        if not any(is_listed(pair.module, (owner,)) for pair in adapter.stacked):
            sentence = f"the entry {entry!r} matches none of the adapter's tensors"
            hint = "remove it from adapter_config.json if it was never trained"
            issues.append(error("unmatched-target", "target_parameters", sentence, hint))
    return issues


def _left_out(rule: TargetRule, sources: Mapping[str, TensorRef]) -> frozenset[str]:
    """Return the base's modules that the rule does not match; an entry may stand for one of those.

    PEFT saves ``"all-linear"`` expanded, with the modules that ``exclude_modules`` takes out again.
    """
    modules = (name.removesuffix(".weight") for name in sources if name.endswith(".weight"))
    return frozenset(module for module in modules if not rule.matches(module))


def _missing(
    rule: TargetRule,
    adapter: Adapter,
    sources: Mapping[str, TensorRef],
    skeleton: Callable[[], Skeleton | None],
    tie: Tie | None,
) -> list[Issue]:
    """Return an issue for each layer that the configuration targets and the adapter lacks."""
    taken = adapter.modules | {parameter.rpartition(".")[0] for parameter in adapter.replacements}
    taken |= {delta.module for delta in adapter.deltas} | _rankless(adapter)
    candidates = [
        module
        for name, ref in sources.items()
        if name.endswith(".weight") and len(ref.shape) >= 2
        for module in [name.removesuffix(".weight")]
        if module not in taken and rule.matches(module) and not (tie and name == tie.head)
    ]
    if not candidates:
        return []
    known = skeleton()
    if known is None:
        sentence = f"and {len(candidates) - 1} more are targeted by the config; the adapter has no tensors"
        hint = "transformers has no class for this model, so whether they are linear layers is unknown"
        return [warning("missing-module", candidates[0], sentence, hint)] if not rule.all_linear else []
    targeted = known.all_linear()
    sentence = "the config targets it, and the adapter has no tensors for it"
    hint = "the adapter file is incomplete; PEFT would leave the module as it is, with a warning"
    return [
        error("missing-module", module, sentence, hint)
        for module in candidates
        if (module in targeted if rule.all_linear else known.is_adaptable(module))
        and not (_by_swift_regex(rule, adapter) and known.classes.get(module) not in _SWIFT_ADAPTS)
    ]


def _by_swift_regex(rule: TargetRule, adapter: Adapter) -> bool:
    """Return True where a regex chose the modules and ms-swift passed over those that it does not adapt."""
    return adapter.trainer == "ms-swift" and isinstance(rule.target_modules, str)


def _rankless(adapter: Adapter) -> frozenset[str]:
    """Return the modules that AdaLoRA's ``rank_pattern`` names: one may have no rank, and no tensors, left."""
    if adapter.kind != "ADALORA":
        return frozenset()
    pattern = adapter.config.get("rank_pattern") or {}
    return frozenset(str(name).removesuffix(".default").removesuffix(".lora_E") for name in pattern)


def _biases(adapter: Adapter, sources: Mapping[str, TensorRef]) -> list[Issue]:
    """Return an issue when the configuration says that biases were trained, and some are not in the file."""
    kind = adapter.config.get("bias", "none")
    if kind == "none":
        return []
    if kind not in {"all", "lora_only"}:
        return [error("bad-field", "bias", f"is {kind!r}, expected 'none', 'all' or 'lora_only'")]
    wanted = [
        name
        for name in sources
        if name.endswith(".bias") and (kind == "all" or name.removesuffix(".bias") in adapter.modules)
    ]
    absent = [name for name in wanted if name not in adapter.replacements]
    hint = "the adapter file is incomplete; PEFT would keep the base's bias, without a word"
    sentence = f"the config says bias={kind!r}, and the adapter has no tensor for it"
    return [error("missing-bias", name, sentence, hint) for name in absent]


def _why_not(rule: TargetRule, module: str) -> str:
    """Return which field of a rule leaves a module out."""
    if rule.excludes(module):
        return "exclude_modules leaves it out"
    if rule.all_linear:
        return 'target_modules="all-linear" does not cover it'
    if replace(rule, layers_to_transform=None).matches(module):
        return "layers_to_transform leaves its layer out"
    return "target_modules does not match it"
