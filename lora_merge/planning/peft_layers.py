"""Adapters that PEFT's own layers merge: the modules that they change, and the tensors that go with each."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import Delta
from lora_merge.core.checkpoint import ConfigPatch, patched_config
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_TYPES, shape_text
from lora_merge.core.weight import Weight
from lora_merge.deltas import PeftLayerFacts
from lora_merge.layouts import LayoutError, Located
from lora_merge.peft_rules.base_factors import factors_of
from lora_merge.peft_rules.hints import DROPPED, SERVE_UNMERGED, incomplete
from lora_merge.peft_rules.injection import (
    BIAS_TYPES,
    Injection,
    InjectionError,
    Target,
    parents,
    sort_by_module,
)
from lora_merge.peft_rules.kinds import (
    DECOMPOSING,
    NATIVE,
    PREFIX,
    TRAINER_FIELDS,
    field_issues,
    mutating_init,
)
from lora_merge.peft_rules.patterns import TargetError, patterns_of
from lora_merge.peft_rules.targets import matching_patterns
from lora_merge.planning.model import SAVE_ANEW, misplaced
from lora_merge.planning.rules import resolved_rule
from lora_merge.planning.vocabulary import vocabulary_patch
from lora_merge.quantised import plain_config

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from lora_merge.core.adapter import Adapter, AdapterUse, PlacedDelta
    from lora_merge.core.tensor import TensorRef
    from lora_merge.peft_rules.targets import TargetRule
    from lora_merge.planning.model import Model


def peft_layer_deltas(use: AdapterUse, model: Model) -> tuple[tuple[PlacedDelta, ...], list[Issue]]:
    """Return a delta for each parameter of each module that PEFT would wrap, and issues for what does not fit."""
    join = _Join(use, model)
    try:
        join.run()
    except InjectionError as exc:
        join.issues.append(error("injection", exc.subject, exc.sentence))
    except TargetError as exc:
        join.issues.append(exc.issue)
    return tuple(join.deltas), join.issues


class _Join:
    """The join of one such adapter and the base, module by module."""

    def __init__(self, use: AdapterUse, model: Model) -> None:
        self._use, self._adapter, self._model = use, use.adapter, model
        self._tensors = _spelled_as_in_memory(use.adapter.peft_layers, model)
        self._probed: set[tuple[object, ...]] = set()
        self._own_paths: dict[str, str] = {}
        """Module in the model → in the adapter, where that has other names."""
        self._located: dict[str, Located] = {}
        """By parameter of the model."""
        self._config_texts = ("", "")
        """Configurations of the model that was trained and of the adapter, as JSON texts."""
        self._brought = _resized_embeddings(use.adapter, model)
        self.deltas: list[PlacedDelta] = []
        self.issues: list[Issue] = []

    def run(self) -> None:
        """Let PEFT inject the adapter into the model without weights, and make a delta for each parameter that it
        changes.

        Raises:
            InjectionError: PEFT refuses.
        """
        tensors = self._tensors
        config = self._adapter_config()
        model_config = self._model_config()
        self._config_texts = json.dumps(model_config), json.dumps(config)
        # Zeros: the injection asks for shapes of shared tensors, and values come with the merge.
        placeholders = {name: _blank(ref) for name, ref in tensors.items() if not name.startswith(PREFIX)}
        injection = Injection(model_config, config, placeholders)
        # Fields of LoRA are known without PEFT, and were checked when the adapter was read.
        if self._adapter.kind not in NATIVE:
            self.issues += field_issues(self._adapter.config, injection.fields | TRAINER_FIELDS)
        by_module, shared, orphans = sort_by_module(tensors, injection.targets)
        hint = DROPPED
        self.issues += [
            error("unexpected-tensor", name, "has tensors, and the config targets no such module", hint)
            for name in orphans
        ]
        for target in injection.targets:
            own = {name: tensors[name] for name in by_module.get(target.module, ())}
            # With shared tensors (VeRA) a module may have no tensors.
            if not own and not shared:
                sentence = "the config targets it, and the adapter has no tensors for it"
                hint = incomplete("would only warn and leave the module unchanged")
                self.issues.append(error("missing-module", target.module, sentence, hint))
                continue
            base = self._base_of(target)
            if base is not None and self._has_bias(target):
                self._probe(injection, target, own, base)
                self._add(target, own | {name: tensors[name] for name in shared}, base)

    def _model_config(self) -> Mapping[str, Any]:
        """Return the configuration of the model that was trained: the base's, with the adapter's vocabulary."""
        patch: dict[str, Any] = {}
        for name, ref in self._brought.items():
            patch |= vocabulary_patch(self._model.config, self._model.source(name).shape[0], ref.shape[0])
        # Weights are decoded, so PEFT's layers for quantised ones have nothing to do.
        dropped = plain_config(self._model.config)
        changes = ConfigPatch(patch, dropped)
        return patched_config(self._model.config, changes) if patch or dropped else self._model.config

    def _adapter_config(self) -> Mapping[str, Any]:
        """Return a configuration whose targets mean the modules of the model as transformers names them now.

        Raises:
            TargetError: a field has a value that PEFT could not use.
        """
        config = self._adapter.config
        rule = resolved_rule(self._adapter, self._model)
        # A regex may match containers too (ms-swift), or mean the names of another release. It is checked here
        # against the adapter's names, and then replaced by the modules with tensors.
        as_stored = self._tensors.keys() == self._adapter.peft_layers.keys()
        if as_stored and (rule.all_linear or not isinstance(rule.target_modules, str)):
            return _reduced(config, rule, tuple(self._model.skeleton.classes if self._model.skeleton else ()))
        classes = self._model.skeleton.classes if self._model.skeleton else {}
        modules = self._own_paths
        for ours, theirs in zip(self._tensors, self._adapter.peft_layers, strict=True):
            owner = next((path for path in parents(ours.removeprefix(PREFIX)) if path in classes), None)
            if owner is not None and ours.startswith(PREFIX):
                depth = ours.removeprefix(f"{PREFIX}{owner}").count(".")
                modules[owner] = theirs.removeprefix(PREFIX).rsplit(".", depth)[0]
        hint = DROPPED
        self.issues += [
            error("unexpected-tensor", path, "has tensors, and target_modules does not match it", hint)
            for path in modules.values()
            if not rule.matches(path)
        ]
        fixed = {"target_modules": sorted(modules), "exclude_modules": None, "layers_to_transform": None}
        return {**config, **fixed, **_by_module(config, modules)}

    def _base_of(self, target: Target) -> dict[str, Weight] | None:
        """Return the stored parameters of a module; None, and an issue, when one is missing, in parts, or no float."""
        if any(name.startswith("parametrizations.") for name in target.parameters):
            sentence = (
                "its weight is computed from other tensors (weight_norm), so the checkpoint has no weight to "
                "change"
            )
            self.issues.append(error("unsupported", target.module, sentence, SERVE_UNMERGED))
            return None
        base: dict[str, Weight] = {}
        for parameter in target.parameters:
            found = self._stored(target, parameter)
            if found is None or found.whole is None:
                return None
            self._located[f"{target.module}.{parameter}"] = found
            # PEFT loads a resized embedding into the base before it adapts it.
            brought = self._brought.get(found.whole)
            base[parameter] = self._model.source(found.whole) if brought is None else Weight.dense(brought)
        odd_shape = _not_mergeable(self._adapter, target, base.get("weight"))
        if odd_shape is not None:
            self.issues.append(odd_shape)
            return None
        odd = next((weight for weight in base.values() if not weight.holds_floats), None)
        if odd is not None:
            sentence = f"is stored as {odd.dtype}, expected BF16, F16 or F32"
            self.issues.append(
                error("unsupported", odd.name, sentence, "merge into the full-precision model")
            )
            return None
        return base

    def _stored(self, target: Target, parameter: str) -> Located | None:
        """Return where a parameter is stored; None, and an issue, where it is not stored whole."""
        path = f"{target.module}.{parameter}"
        try:
            found = self._model.locate(path, None)
        except LayoutError as exc:
            self.issues.append(misplaced(path, exc))
            return None
        if found is None:
            sentence = f"the adapter changes this parameter, and the base has no {path}"
            hint = "check --base: the adapter belongs to another model"
            self.issues.append(error("unmatched-module", target.module, sentence, hint))
        elif found.whole is None or found.places[0].transposed:
            tensor = found.places[0].tensor
            sentence = f"is stored in another form, in {tensor}, and this PEFT method needs the whole weight"
            self.issues.append(error("unsupported", path, sentence, SAVE_ANEW))
            return None
        return found

    def _probe(
        self,
        injection: Injection,
        target: Target,
        own: Mapping[str, TensorRef],
        base: Mapping[str, Weight],
    ) -> None:
        """Load zeros of the adapter's shapes into a layer of zeros, to hear what PEFT would complain of during the
        merge.
        """
        if self._adapter.kind in DECOMPOSING or mutating_init(self._adapter.config):
            return  # zeros cannot be decomposed
        # Once for all modules whose tensors have the same names and shapes.
        prefix = f"{PREFIX}{target.module}"
        looks = (
            tuple((name.removeprefix(prefix), ref.shape) for name, ref in own.items()),
            tuple((name, weight.shape) for name, weight in base.items()),
        )
        if looks in self._probed:
            return
        self._probed.add(looks)
        blank_base = {name: _zeros(weight.shape, weight.storage.value_dtype) for name, weight in base.items()}
        blank_own = {name: _blank(ref) for name, ref in own.items()}
        try:
            injection.rehearse(target.module, blank_base, blank_own)
        except InjectionError as exc:
            self.issues.append(error("injection", exc.subject, exc.sentence))

    def _has_bias(self, target: Target) -> bool:
        """Return True unless the adapter trains a bias that the module does not have, which is an issue."""
        by_config = bool(self._adapter.config.get("lora_bias"))
        if "bias" in target.parameters or not (by_config or self._adapter.kind == "BEFT"):
            return True
        trains = "lora_bias" if by_config else self._adapter.kind
        listed = ", ".join(target.parameters) or "no parameters"
        sentence = f"{trains} trains a bias, and this module of the base has none (it has {listed})"
        hint = "serve the adapter with PEFT, unmerged: this model's checkpoint has no place for that bias"
        self.issues.append(error("no-effect", target.module, sentence, hint))
        return False

    def _add(self, target: Target, tensors: Mapping[str, TensorRef], base: Mapping[str, Weight]) -> None:
        """Add a delta for each parameter of a module that PEFT's layer changes."""
        changed = changed_parameters(self._adapter, target)
        own_path = self._own_paths.get(target.module, target.module)
        for parameter in changed:
            found = self._located[f"{target.module}.{parameter}"]
            # PEFT's layer needs the whole module; the algebra gets the other parameters as factors.
            others, coded = factors_of({name: one for name, one in base.items() if name != parameter})
            tensor = found.whole or ""
            facts = PeftLayerFacts(
                *self._config_texts,
                digest=self._adapter.digest,
                method=self._adapter.kind,
                module=target.module,
                parameter=parameter,
                shape=base[parameter].shape,
                dtype=self._model.source(tensor).storage.value_dtype,
                changed=tuple(changed),
                coded=coded,
            )
            factors = {f"adapter:{name}": ref for name, ref in tensors.items()} | others
            delta = Delta(f"{own_path}.{parameter}", facts, factors, rounded=True)
            self.deltas.append(delta.placed(tensor, adapter_weight=self._use.weight, rule=found.rule))


def changed_parameters(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """Return the parameters of a module that PEFT's layer may change, by the kind of adapter.

    The merge stops when PEFT changes another one.
    """
    if adapter.kind == "BEFT":
        return tuple(name for name in target.parameters if name == "bias")
    if adapter.kind in BIAS_TYPES or adapter.config.get("lora_bias"):
        return target.parameters
    return tuple(name for name in target.parameters if not name.endswith("bias"))


def _reduced(config: Mapping[str, Any], rule: TargetRule, paths: Sequence[str]) -> Mapping[str, Any]:
    """Return a configuration without patterns that mean no module.

    The others have been matched once when this returns, so that they end in PEFT too.

    Args:
        config: the adapter's.
        rule: of its targets.
        paths: of the model's modules.

    Raises:
        TargetError: a field has a value that PEFT could not use, or one that takes too long to match.
    """
    # PEFT tries each pattern on each module without a limit of time. What was matched here once, within the limit,
    # ends in PEFT too.
    rule.learn(paths)
    meant = config.get("feedforward_modules")
    if isinstance(meant, str):
        patterns_of("feedforward_modules", (meant,), "whole").learn(paths)
    fields: dict[str, Any] = {}
    for field, table in config.items():
        if field.endswith("_pattern") and isinstance(table, dict):
            patterns = patterns_of(field, tuple(table), "end")
            patterns.learn(paths)
            hits = {at for path in paths for at in patterns.matching(path)}
            fields[field] = {key: table[key] for at, key in enumerate(table) if at in hits}
    if len(rule.layers_pattern) > 1:
        patterns = patterns_of("layers_pattern", rule.layers_pattern, "layer")
        hits = {at for path in paths for at in patterns.matching(path)} or {0}
        fields["layers_pattern"] = [one for at, one in enumerate(rule.layers_pattern) if at in hits]
    return {**config, **fields} if fields else config


def _by_module(config: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any]:
    """Return the other fields that name modules, rewritten for the model's paths.

    Args:
        config: the adapter's.
        modules: path in the model → path in the adapter.

    Reference:
        ``peft.utils.other.get_pattern_key`` and ``peft.tuners.ia3.model.IA3Model._check_target_module_feedforward``
        (PEFT 0.21.2).
    """
    fields: dict[str, Any] = {}
    for field, table in config.items():
        if field.endswith("_pattern") and isinstance(table, dict):
            found = {
                path: list(matching_patterns(table, own, field).values()) for path, own in modules.items()
            }
            # PEFT takes the first pattern that matches; a path has to be escaped to be a pattern.
            fields[field] = {re.escape(path): values[0] for path, values in found.items() if values}
    meant = config.get("feedforward_modules")
    if meant:
        fields["feedforward_modules"] = sorted(
            path
            for path, own in modules.items()
            if (
                patterns_of("feedforward_modules", (meant,), "whole").matching(own)
                if isinstance(meant, str)
                else own.endswith(tuple(meant))
            )
        )
    return fields


def _resized_embeddings(adapter: Adapter, model: Model) -> dict[str, TensorRef]:
    """Return the embeddings that an adapter brings in another size, by their stored names."""
    found = {}
    for parameter, replacement in adapter.replacements.items():
        if replacement.why != "embedding":
            continue
        try:
            located = model.locate(parameter, replacement.ref.shape)
        except LayoutError:
            continue  # said where whole parameters are placed
        name = located.whole if located is not None else None
        if name is not None and model.source(name).shape != replacement.ref.shape:
            found[name] = replacement.ref
    return found


def _spelled_as_in_memory(peft_layers: Mapping[str, TensorRef], model: Model) -> dict[str, TensorRef]:
    """Return an adapter's tensors under the names of transformers' model of today."""
    known = model.skeleton
    if known is None:
        return dict(peft_layers)
    spelled = {}
    for name, ref in peft_layers.items():
        path = name.removeprefix(PREFIX)
        # Only where no module above the tensor is one of the model's.
        if path != name and not any(known.parameters.get(parent) for parent in parents(path)):
            owners = ((parent, model.module(parent)) for parent in parents(path))
            found = next(((one, other) for one, other in owners if other in known.classes), None)
            if found is not None:
                path = found[1] + path[len(found[0]) :]
        spelled[PREFIX + path if name.startswith(PREFIX) else name] = ref
    return spelled


def _not_mergeable(adapter: Adapter, target: Target, ref: Weight | None) -> Issue | None:
    """Return the issue of a module for which PEFT's merge differs from its forward pass (PEFT 0.21.2); else None."""
    # OFT's forward pass rotates overlapping patches of a convolution's input, which no kernel can do.
    if adapter.kind != "OFT" or ref is None or max(ref.shape[2:], default=1) == 1:
        return None
    sentence = f"OFT on a convolution with kernel {shape_text(ref.shape[2:])} cannot be merged"
    return error("unsupported", target.module, sentence, SERVE_UNMERGED)


def _blank(ref: TensorRef) -> torch.Tensor:
    """Return zeros of a stored tensor's shape and dtype, in memory."""
    return _zeros(ref.shape, ref.dtype)


def _zeros(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    import torch

    return torch.zeros(shape, dtype=getattr(torch, TORCH_TYPES[dtype]))
