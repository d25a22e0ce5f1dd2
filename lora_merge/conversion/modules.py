"""The draft of an adapter: which modules it will have, and what the factors of each are made from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.conversion.experts import fused, renested, split
from lora_merge.conversion.lora import Changed, Difference, Form, Given, LoraModule, Recipe
from lora_merge.conversion.mlx import for_mlx
from lora_merge.conversion.module_names import filled, renamed
from lora_merge.core.checkpoint import INPUT_NAMES
from lora_merge.core.plan import Merge
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TensorRef, shape_text
from lora_merge.core.weight import Weight
from lora_merge.deltas import FactorFacts, StackedFacts
from lora_merge.formats.weights import same_weights
from lora_merge.peft_rules.kinds import mutating_init
from lora_merge.words import of_several

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.adapter import Adapter, Delta
    from lora_merge.core.facts import Facts
    from lora_merge.core.plan import Step
    from lora_merge.deltas import Stack
    from lora_merge.planning.joined import Joined

MERGE = "merge it: lora-merge --base BASE --adapter ADAPTER --out OUT"
"""Hint for a change that no adapter in the wanted form can hold."""

_TO_LORA = "pass --to-lora with --rank N or --energy SHARE for the closest plain LoRA"


_PLAIN_NAME = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.[^.]+|model\.embed_tokens|lm_head")
"""A module whose name is the same in mlx-lm and transformers for every family."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What will be written, and every issue that was found on the way."""

    modules: tuple[LoraModule, ...]
    whole: Mapping[str, TensorRef]
    """Tensors that are carried as they are, by their names in a PEFT file."""

    issues: tuple[Issue, ...] = ()
    decoded: Mapping[str, Weight] = field(default_factory=dict)
    """Weights that are carried too, and are decoded for it, by their names in a PEFT file."""


@dataclass(slots=True)
class _Sketch:
    """A draft under construction."""

    modules: list[LoraModule] = field(default_factory=list)
    whole: dict[str, TensorRef] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)


def needs_base(adapter: Adapter, recipe: Recipe) -> bool:
    """Return True if an adapter's own files do not suffice for a conversion."""
    reaches_further = bool(
        recipe.naming or recipe.experts or recipe.fills or recipe.without_copies or recipe.format != "peft"
    )
    # mlx-lm's names of other modules depend on the family, which the base's config tells.
    is_foreign = adapter.format == "mlx" and any(
        not _PLAIN_NAME.fullmatch(module) for module in adapter.modules
    )
    # Without factors a change has to be computed on the weights that it changes.
    unfactored = recipe.to_lora and not (_is_plain(adapter) and not adapter.config.get("ensure_weight_tying"))
    return reaches_further or unfactored or is_foreign or bool(adapter.stacked)


def draft(adapter: Adapter, recipe: Recipe, joined: Joined | None) -> Draft:
    """Return the modules of the adapter that is to be written, and every reason why it cannot be.

    Args:
        adapter: what is converted.
        recipe: what is done to it.
        joined: the adapter on its base; required where `needs_base` is True.
    """
    drafting = _Drafting(adapter, recipe, joined)
    drafting.run()
    found = drafting.found
    if joined is not None and not found.issues:
        # Experts first, since renaming needs the modules that will be written; zeros after that, under the
        # final names.
        if recipe.experts == "split":
            found.modules, issues = split(found.modules, joined)
            found.issues += issues
        elif recipe.experts == "fuse":
            found.modules, issues = fused(found.modules, joined)
            found.issues += issues
        if recipe.naming is not None:
            found.modules, found.whole, issues = renamed(found.modules, found.whole, recipe.naming, joined)
            found.issues += issues
        if recipe.experts or recipe.naming:
            found.modules = renested(found.modules, joined)
        if recipe.fills:
            found.modules = filled(found.modules, joined, recipe)
        if recipe.format == "mlx":
            found.modules, issues = for_mlx(found.modules, joined)
            found.issues += issues
        found.modules.sort(key=lambda module: _natural(module.path))
    if not found.modules and not found.issues:
        found.issues.append(
            error("empty", adapter.root, "has no module that a LoRA can be written for", MERGE)
        )
    return Draft(tuple(found.modules), found.whole, tuple(found.issues))


def _is_product(delta: Delta) -> bool:
    """Return True if a change is the product of its factors and nothing else: no lengths, no dependence on the base."""
    return delta.facts.has_factors and delta.facts.is_sum


def _stack_of(facts: Facts) -> Stack | None:
    """Return how the factors of all experts are stacked; None if they are not."""
    return facts.stack if isinstance(facts, FactorFacts) else None


def _is_plain(adapter: Adapter) -> bool:
    """Return True if all that an adapter changes has factors in its file."""
    return not (adapter.peft_layers or adapter.replacements or not all(map(_is_product, adapter.deltas)))


class _Drafting:
    """Sorts the parts of one adapter, under its own names, into modules, whole tensors and issues."""

    def __init__(self, adapter: Adapter, recipe: Recipe, joined: Joined | None) -> None:
        self._adapter, self._recipe, self._joined = adapter, recipe, joined
        self.found = _Sketch()

    def run(self) -> None:
        """Sort all parts of the adapter. Stops early if its kind cannot be converted at all."""
        self.found.issues += self._kind_issues()
        if self.found.issues:
            return
        groups = self._groups()
        given = {parameter: None for parameter, deltas in groups.items() if self._stays(deltas)}
        for parameter in given:
            self._give(parameter, groups)
        if self._recipe.to_lora:
            self._change(given.keys())
            self._change_twins()
        else:
            self._carry(groups.keys() - given.keys(), groups)
        self._stack()
        self.found.modules.sort(key=lambda module: _natural(module.path))

    def _kind_issues(self) -> list[Issue]:
        """Return the reasons why an adapter of this kind cannot be converted."""
        adapter, recipe = self._adapter, self._recipe
        if any(
            delta.round_before_next or delta.parameter.endswith("in_proj_weight") for delta in adapter.deltas
        ):
            sentence = "is LoRA on nn.MultiheadAttention, whose output projection PEFT changes twice"
            return [error("unsupported", adapter.root, sentence, MERGE)]
        if adapter.config.get("layer_replication") and (recipe.is_renamed or recipe.format != "peft"):
            sentence = "repeats layers of the base, which other names or formats cannot express"
            return [error("unsupported", "layer_replication", sentence, MERGE)]
        if recipe.to_lora:
            return []
        return self._beside() or self._unfactored()

    def _beside(self) -> list[Issue]:
        """Return an issue if whole parameters are in a file beside the adapter's."""
        beside = [name for name, one in self._adapter.replacements.items() if one.why == "saved"]
        if not beside:
            return []
        sentence = of_several(
            len(beside),
            "is a whole parameter in a second file of the adapter",
            "are whole parameters in a second file of the adapter",
        )
        return [error("unsupported", min(beside), sentence, MERGE)]

    def _unfactored(self) -> list[Issue]:
        """Return an issue if the adapter has no factors, or they are not its whole change."""
        adapter, recipe = self._adapter, self._recipe
        kasa = bool(adapter.config.get("kasa_config"))  # a field that is not written
        init = "KaSA" if kasa else mutating_init(adapter.config)
        if init is not None and (kasa or recipe.is_rescaled or recipe.is_renamed):
            sentence = f"{init} changed the base before training, by factors of this rank and scale"
            hint = f"{_TO_LORA}, and --base-is to say which base it is"
            return [error("unsupported", "init_lora_weights", sentence, hint)]
        if adapter.peft_layers and init is None:
            sentence = f"a {adapter.kind} adapter has no LoRA factors"
            return [error("unsupported", "peft_type", sentence, _TO_LORA)]
        return []

    def _groups(self) -> dict[str, list[Delta]]:
        groups: dict[str, list[Delta]] = {}
        for delta in self._adapter.deltas:
            groups.setdefault(delta.parameter, []).append(delta)
        return groups

    def _stays(self, deltas: list[Delta]) -> bool:
        """Return True for a module that is written with the factors that it has."""
        if self._recipe.to_lora:
            # An initialisation that changed the base: the change from the published base is more than these
            # factors.
            again = bool(self._adapter.config.get("kasa_config")) or mutating_init(self._adapter.config)
            return all(map(_is_product, deltas)) and not again
        return all(delta.facts.has_factors for delta in deltas)

    def _give(self, parameter: str, groups: Mapping[str, list[Delta]]) -> None:
        """Add a module with its own factors, and the tensors that belong to it: DoRA's magnitude, a bias of B."""
        (delta,) = groups[parameter]
        magnitude = delta.factors.get("magnitude")
        if magnitude is not None and self._recipe.keep is not None:
            sentence = "is DoRA, and what a lower rank does to it depends on the base's weights"
            self.found.issues.append(
                error("unsupported", delta.module, sentence, "--to-lora makes plain LoRA of it")
            )
            return
        kept = {"lora_magnitude_vector": magnitude} if magnitude is not None else {}
        for one in groups.get(f"{delta.module}.bias", ()):
            kept["lora_B.bias"] = one.factors["addend"]
        form: Form = "embedding" if self._is_embedding(delta) else "linear"
        shape = delta.facts.weight_shape(delta.factors) or ()
        if len(shape) > 2:
            form = "convolution"
        if parameter in self._kernels:
            form, shape = "convolution", self._kernels[parameter]
        rank, scale = delta.rank, delta.effective_scale
        if form == "embedding" and not delta.transposed:  # MLX: the factors are those of [vocabulary, dim]
            origin = Given(delta, turned=True)
            self._add(LoraModule(delta.module, "embedding", origin, shape[::-1], rank, scale))
            return
        self._add(LoraModule(delta.module, form, Given(delta), shape, rank, scale, kept))

    def _add(self, module: LoraModule) -> None:
        self.found.modules.append(module)

    @cached_property
    def _kernels(self) -> dict[str, tuple[int, ...]]:
        """Shapes of convolutions, by parameter. AdaLoRA stores flat factors for them, so the factors do not tell."""
        return {
            delta.target: step.shape
            for step in (self._joined.steps if self._joined else ())
            for delta in (step.op.deltas if isinstance(step.op, Merge) else ())
            if len(step.shape) > 2 and not (delta.part or delta.region.box or _stack_of(delta.facts))
        }

    def _is_embedding(self, delta: Delta) -> bool:
        is_input = delta.module.rpartition(".")[2] in INPUT_NAMES
        return delta.transposed or (self._adapter.format == "mlx" and is_input)

    def _carry(self, parameters: set[str], groups: Mapping[str, list[Delta]]) -> None:
        """Carry whatever has no factors as it is. Transforms of factors do not affect it."""
        for parameter in sorted(parameters):
            for delta in groups[parameter]:
                if delta.facts.replaces_rows:
                    self.found.whole[delta.factors["rows"].name] = delta.factors["rows"]
        copies = self._joined.unchanged if self._joined and self._recipe.drops_copies else ()
        for parameter, one in self._adapter.replacements.items():
            for ref in (one.ref, one.original) if parameter not in copies else ():
                if ref is not None:
                    self.found.whole[ref.name] = ref
        if self._recipe.format != "peft" and self.found.whole:
            name = min(self.found.whole)
            sentence = f"is saved whole, which the format {self._recipe.format} cannot hold"
            self.found.issues.append(error("unsupported", name, sentence, _TO_LORA))
        for module in self.found.modules:
            if self._recipe.format != "peft" and module.kept:
                what = "DoRA" if "lora_magnitude_vector" in module.kept else "a bias of lora_B"
                sentence = f"has {what}, which the format {self._recipe.format} cannot hold here"
                self.found.issues.append(error("unsupported", module.path, sentence, _TO_LORA))

    def _stack(self) -> None:
        """Add the modules of stacked experts with their stacked factors."""
        for pair in self._adapter.stacked:
            assert self._joined is not None
            delta = next((one for one in self._joined.deltas if one.factors == pair.tensors), None)
            if delta is None:
                continue  # the plan said why
            a, b = pair.tensors["A"].shape, pair.tensors["B"].shape
            stack = _stack_of(delta.facts)
            shape = (stack.experts, b[0], a[1]) if stack else (b[0], a[1])
            whole = replace(delta.delta, facts=StackedFacts(stack=stack)) if stack else delta.delta
            scale, depth = delta.effective_scale, pair.depth
            self._add(
                LoraModule(delta.target, "experts", Given(whole), shape, delta.rank, scale, depth=depth)
            )

    def _change(self, given: Collection[str]) -> None:
        """Add a module to decompose for each stored weight that changes without factors."""
        assert self._joined is not None or _is_plain(self._adapter)
        stacked = {ref.name for pair in self._adapter.stacked for ref in pair.tensors.values()}
        for step in self._joined.steps if self._joined else ():
            deltas = step.op.deltas if isinstance(step.op, Merge) else ()
            is_new = self._is_new(step)
            if not is_new and all(
                delta.target in given or not stacked.isdisjoint(ref.name for ref in delta.factors.values())
                for delta in deltas
            ):
                continue
            target = deltas[0].target if deltas else self._name_of(step)
            self._add_changed(step, target, is_new=is_new)

    def _change_twins(self) -> None:
        """Give LoRA to both ends of a tie. Only one of them is stored, and PEFT has a layer for each."""
        known = {module.path for module in self.found.modules}
        for module in list(self.found.modules):
            twin = self._joined.twin(module.path) if self._joined else None
            if twin and twin not in known:
                assert isinstance(module.origin, Given | Changed | Difference)
                form: Form = "linear" if module.form == "embedding" else "embedding"
                origin = replace(module.origin, turned=not module.origin.turned)
                self._add(replace(module, path=twin, form=form, origin=origin, shape=module.shape[::-1]))

    def _is_new(self, step: Step) -> bool:
        """Return True for a replaced weight that differs from the base's. PEFT also saves unchanged embeddings."""
        assert self._joined is not None
        before = self._joined.before(step.name) if step.replaced else None
        return step.replaced and (before is None or not same_weights(before, step.source))

    def _add_changed(self, step: Step, target: str, *, is_new: bool) -> None:
        stored = step.shape
        deltas = step.op.deltas if isinstance(step.op, Merge) else ()
        module, _, parameter = target.rpartition(".")
        # A decomposition needs the whole matrix of a module.
        if any(delta.region.box or delta.part for delta in deltas):
            sentence = "is stored in parts, or as a part, and is not plain LoRA"
            self.found.issues.append(error("unsupported", target, sentence, MERGE))
            return
        if parameter != "weight" or len(stored) < 2:
            sentence = f"has the shape {shape_text(stored)} and is changed, but LoRA can change matrices only"
            self.found.issues.append(error("unsupported", target, sentence, MERGE))
            return
        is_embedding = self._is_input(module)
        turned = is_embedding or self._is_conv1d(module)
        shape = stored[::-1] if turned else stored
        form: Form = "embedding" if is_embedding else "convolution" if len(shape) > 2 else "linear"
        if form == "convolution" and self._joined is not None and self._joined.is_grouped(module):
            sentence = "is a grouped convolution, and grouped convolutions cannot be expressed as a LoRA"
            self.found.issues.append(error("unsupported", target, sentence, MERGE))
            return
        if is_new:
            assert self._joined is not None
            before, after = self._joined.before(step.name), step.source
            if before is None or before.shape != after.shape:
                found = f"the base has {shape_text(before.shape)}" if before else "the base does not have it"
                verb = "resize a weight" if before else "add a weight"
                sentence = f"has the shape {shape_text(after.shape)}, but {found}: LoRA cannot {verb}"
                self.found.issues.append(error("unsupported", target, sentence, MERGE))
                return
            if deltas:
                sentence = "is replaced as a whole, and also changed by a delta"
                self.found.issues.append(error("unsupported", target, sentence, MERGE))
                return
            self._add(LoraModule(module, form, Difference(before, after, turned), shape, 0))
            return
        self._add(LoraModule(module, form, Changed(step, turned), shape, 0))

    def _name_of(self, step: Step) -> str:
        """Return the adapter's name of a parameter that a step replaces."""
        ref = step.source.plain
        return next(name for name, one in self._adapter.replacements.items() if one.ref == ref)

    def _is_input(self, module: str) -> bool:
        assert self._joined is not None
        kind = self._joined.class_of(module)
        return kind == "Embedding" if kind else module.rpartition(".")[2] in INPUT_NAMES

    def _is_conv1d(self, module: str) -> bool:
        assert self._joined is not None
        return self._joined.class_of(module) == "Conv1D"


def _natural(path: str) -> list[tuple[int, str]]:
    """Return a sort key that puts layer 9 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]
