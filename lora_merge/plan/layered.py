"""Adapters that PEFT's own layers merge: which modules they change, and which tensors go with each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import DeltaSpec
from lora_merge.core.injection import BIAS_TYPES, Injection, InjectionError, Target, sort_by_module
from lora_merge.core.kinds import DECOMPOSING, NATIVE, PREFIX, TRAINER_FIELDS, field_issues, mutating_init
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TORCH_NAMES, TORCH_TYPES, shape_text

if TYPE_CHECKING:
    import torch

    from lora_merge.core.adapter import Adapter, AdapterUse
    from lora_merge.core.tensor import TensorRef
    from lora_merge.plan.outline import Outline
    from lora_merge.plan.ties import Tie


def layered_deltas(
    use: AdapterUse, outline: Outline, config: Mapping[str, Any], tie: Tie | None
) -> tuple[tuple[DeltaSpec, ...], list[Issue]]:
    """Return a delta for each parameter of each module that PEFT would wrap, and what does not fit.

    Args:
        use: the adapter.
        outline: the names of the output.
        config: the base's ``config.json``.
        tie: of the embeddings, if there is one and the adapter touches it.
    """
    sources = dict(outline.sources)
    if tie is not None:
        sources |= {name: sources[tie.source] for name in (tie.embedding, tie.head) if name not in sources}
    join = _Join(use, sources, config)
    try:
        join.run()
    except InjectionError as exc:
        join.issues.append(error("injection", exc.subject, exc.sentence))
    return tuple(join.deltas), join.issues


class _Join:
    """The tensors of one adapter, module by module."""

    def __init__(self, use: AdapterUse, sources: Mapping[str, TensorRef], config: Mapping[str, Any]) -> None:
        self._use, self._adapter, self._sources, self._config = use, use.adapter, sources, config
        self._options = {
            "model_config": json.dumps(config),
            "adapter_config": json.dumps(use.adapter.config),
            "digest": use.adapter.digest,
        }
        self._probed: set[tuple[object, ...]] = set()
        self.deltas: list[DeltaSpec] = []
        self.issues: list[Issue] = []

    def run(self) -> None:
        """Let PEFT inject the adapter into the model without weights, and join what it targets.

        Raises:
            InjectionError: PEFT refuses.
        """
        layered = self._adapter.layered
        placeholders = {name: _blank(ref) for name, ref in layered.items() if not name.startswith(PREFIX)}
        injection = Injection(self._config, self._adapter.config, placeholders)
        if self._adapter.kind not in NATIVE:
            self.issues += field_issues(self._adapter.config, injection.fields | TRAINER_FIELDS)
        by_module, shared, orphans = sort_by_module(layered, injection.targets)
        hint = "PEFT would drop these tensors without a word; the config is not the one of training"
        self.issues += [
            error("unexpected-tensor", name, "belongs to no module that the config targets", hint)
            for name in orphans
        ]
        for target in injection.targets:
            own = {name: layered[name] for name in by_module.get(target.module, ())}
            if not own and not shared:
                sentence = "the config targets it, and the adapter has no tensors for it"
                hint = "the adapter file is incomplete; PEFT would leave the module as it is, with a warning"
                self.issues.append(error("missing-module", target.module, sentence, hint))
                continue
            base = self._base_of(target)
            if base is not None:
                self._probe(injection, target, own, base)
                self._add(target, own | {name: layered[name] for name in shared}, base)

    def _base_of(self, target: Target) -> dict[str, TensorRef] | None:
        """Return the stored parameters of a module, or None when one is missing or is no float."""
        sources = self._sources
        names = {parameter: f"{target.module}.{parameter}" for parameter in target.parameters}
        if any(name.startswith("parametrizations.") for name in target.parameters):
            sentence = (
                "its weight is computed from others (weight_norm), so that none is stored to be changed"
            )
            self.issues.append(error("unsupported", target.module, sentence, "serve it with PEFT"))
            return None
        absent = [name for name in names.values() if name not in sources]
        if absent:
            sentence = f"the adapter changes it, the base has no {absent[0]}"
            self.issues.append(error("unmatched-module", target.module, sentence))
            return None
        odd_shape = _not_mergeable(self._adapter, target, sources)
        if odd_shape is not None:
            self.issues.append(odd_shape)
            return None
        base = {parameter: sources[name] for parameter, name in names.items()}
        odd = next((ref for ref in base.values() if ref.dtype not in TORCH_NAMES), None)
        if odd is not None:
            sentence = f"is stored as {odd.dtype}, expected BF16, F16 or F32"
            self.issues.append(
                error("unsupported", odd.name, sentence, "merge into the full-precision model")
            )
            return None
        return base

    def _probe(
        self,
        injection: Injection,
        target: Target,
        own: Mapping[str, TensorRef],
        base: Mapping[str, TensorRef],
    ) -> None:
        """Load zeros of the adapter's shapes into a layer of zeros, once for all modules that look alike.

        What PEFT would complain of during the merge, or fill with noise, comes out here.
        """
        if self._adapter.kind in DECOMPOSING or mutating_init(self._adapter.config):
            return  # nothing can be decomposed that is zero
        prefix = f"{PREFIX}{target.module}"
        looks = (
            tuple((name.removeprefix(prefix), ref.shape) for name, ref in own.items()),
            tuple((name, ref.shape) for name, ref in base.items()),
        )
        if looks in self._probed:
            return
        self._probed.add(looks)
        blank_base = {name: _blank(ref) for name, ref in base.items()}
        blank_own = {name: _blank(ref) for name, ref in own.items()}
        try:
            injection.rehearse(target.module, blank_base, blank_own)
        except InjectionError as exc:
            self.issues.append(error("injection", exc.subject, exc.sentence))

    def _add(self, target: Target, tensors: Mapping[str, TensorRef], base: Mapping[str, TensorRef]) -> None:
        """Add a delta for each parameter of a module that changes."""
        changed = changed_parameters(self._adapter, target)
        for parameter in changed:
            others = {f"base:{name}": ref for name, ref in base.items() if name != parameter}
            options = {
                **self._options,
                "module": target.module,
                "parameter": parameter,
                "shape": list(base[parameter].shape),
                "dtype": base[parameter].dtype,
                "changed": list(changed),
            }
            self.deltas.append(
                DeltaSpec(
                    kind="peft_layer",
                    parameter=f"{target.module}.{parameter}",
                    tensors={f"adapter:{name}": ref for name, ref in tensors.items()} | others,
                    scale=1.0,
                    rounded=True,
                    options=options,
                    weight=self._use.weight,
                )
            )


def changed_parameters(adapter: Adapter, target: Target) -> tuple[str, ...]:
    """Return the parameters of a module that PEFT's layer changes; all others are held against it in the merge."""
    if adapter.kind == "BEFT":
        return tuple(name for name in target.parameters if name == "bias")
    if adapter.kind in BIAS_TYPES or adapter.config.get("lora_bias"):
        return target.parameters
    return tuple(name for name in target.parameters if not name.endswith("bias"))


def _not_mergeable(adapter: Adapter, target: Target, sources: Mapping[str, TensorRef]) -> Issue | None:
    """Return the issue of a module that PEFT merges into something else than it computes (PEFT 0.21.2).

    OFT's forward pass rotates overlapping patches of a convolution's input, which no kernel does.
    """
    ref = sources.get(f"{target.module}.weight")
    if adapter.kind != "OFT" or ref is None or max(ref.shape[2:], default=1) == 1:
        return None
    sentence = f"OFT on a convolution of kernel {shape_text(ref.shape[2:])} has no merged form"
    return error("unsupported", target.module, sentence, "serve it with PEFT")


def _blank(ref: TensorRef) -> torch.Tensor:
    """Return zeros of a stored tensor's shape and dtype."""
    import torch

    dtype = getattr(torch, TORCH_TYPES[ref.dtype])
    return torch.zeros(ref.shape, dtype=dtype)
