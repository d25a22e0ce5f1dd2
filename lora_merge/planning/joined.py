"""A base and its adapters, joined: what each tensor of an output is, and what is done to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_merge.core.adapter import AdapterUse
from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, Checkpoint, SideFile
from lora_merge.core.plan import Merge
from lora_merge.core.report import Issue
from lora_merge.layouts import Stored
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.skeleton import Skeleton, build_skeleton, meta_model
from lora_merge.planning.change import Change
from lora_merge.planning.outline import Outline
from lora_merge.planning.placing import slots_of
from lora_merge.planning.settings import Policy, Reading
from lora_merge.planning.steps import Wanted
from lora_merge.planning.storing import storing_of
from lora_merge.planning.ties import Tie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Step
    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Storage, Weight

_UNCHANGED = Change()


@dataclass(frozen=True)
class Joined:
    """A base and its adapters, and where each change of theirs belongs. Made by `lora_merge.planning.join`.

    A join with errors among its issues can only report them; nothing is built on it. What takes long to find out (the
    module tree, how transformers reads the tensors) is computed when it is asked for and kept; it is not part of the value.
    """

    base: Checkpoint
    uses: tuple[AdapterUse, ...]
    """The adapters, in the order in which they are applied."""

    reading: Reading
    """How they were read."""

    outline: Outline
    """Names of the output, and the stored tensor behind each. Users of one weight that are written apart have the same one."""

    changes: Mapping[str, Change]
    """What is done to the tensors that change, by name. Each delta says what the adapter calls its parameter, and by
    which rule it was matched."""

    config_patch: Mapping[str, Any]
    """Dotted path in ``config.json`` → new value: of repeated layers, a head, a vocabulary, an untied pair."""

    tie: Tie | None
    """The tie of the embeddings, where the base has one and an adapter touches it."""

    is_untied: bool
    """True when the ends of that tie change differently, so that both are written."""

    side_files: tuple[SideFile, ...]
    """The files beside the weights: the base's, or an adapter's own."""

    issues_of_base: tuple[Issue, ...]
    issues_of_adapters: tuple[Issue, ...]
    """Of each by itself, and of its files beside the base's."""

    issues_of_fit: tuple[Issue, ...]
    """Of the adapters on the base."""

    issues_of_files: tuple[Issue, ...]
    """Of what goes with the weights, or is left out."""

    is_whole: bool
    """False when the join ended early, since base and adapters have too little in common for further questions."""

    def __getstate__(self) -> dict[str, object]:
        """Return the fields without what was computed from them."""
        # Computed values hold models of transformers, and can be computed again.
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def issues(self) -> tuple[Issue, ...]:
        """Everything that is wrong, or worth knowing, in the order in which it is printed."""
        return (
            *self.issues_of_base,
            *self.issues_of_adapters,
            *self.issues_of_fit,
            *self.issues_of_files,
        )

    @property
    def unchanged(self) -> frozenset[str]:
        """Whole parameters in the adapters that are only copies of the base's."""
        return frozenset().union(*(use.unchanged for use in self.uses))

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter → shape, of those that the adapters bring whole."""
        return {name: change.source.shape for name, change in self.changes.items() if change.source}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that a tensor has in the output."""
        return self.shapes.get(name, self.outline.sources[name].shape)

    def steps_into(
        self,
        files: tuple[OutputFile, ...],
        parts: Sequence[tuple[str, str]],
        storages: Mapping[str, Storage],
        policy: Policy,
    ) -> tuple[Step, ...]:
        """Return the steps that make an output, in the order of its bytes.

        Args:
            files: of the output.
            parts: ``(parameter, role)`` of each of their tensors, in order.
            storages: how each parameter is stored.
            policy: how changes of several adapters become one.
        """
        slots = [slot for file in files for slot in file.slots]
        writes: dict[str, dict[str, TensorRef]] = {}
        # Slots have names of stored tensors, so they are matched with parameters by their order.
        for (name, role), slot in zip(parts, slots, strict=True):
            writes.setdefault(name, {})[role] = slot
        order = {slot.name: n for n, slot in enumerate(slots)}
        steps = (
            step
            for name, places in writes.items()
            for step in self._wanted(name, storages[name], places).steps(policy)
        )
        return tuple(sorted(steps, key=lambda step: order[step.main.name]))

    def _wanted(self, name: str, target: Storage, writes: Mapping[str, TensorRef]) -> Wanted:
        """Return a parameter of the output, with its source and what is done to it."""
        tie = self.tie if not self.is_untied else None
        # Both names of a kept tie must get the same random values.
        key = tie.source if tie is not None and name in tie.stored else name
        change = self.changes.get(name, _UNCHANGED)
        return Wanted(name, self.outline.sources[name], change, target, writes, key)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Steps that change something, tensor by tensor, as the base stores it; their slots have no place in a file.

        Changes of several adapters are added up.
        """
        storages = storing_of(self.base, self.outline, self.changes, None, Policy()).storages
        slots = slots_of(self.outline, self.shapes, storages)
        writes: dict[str, dict[str, TensorRef]] = {}
        for (name, role), slot in slots.items():
            writes.setdefault(name, {})[role] = slot
        steps = (
            step
            for name in writes
            if name in self.changes
            for step in self._wanted(name, storages[name], writes[name]).steps(Policy())
        )
        return tuple(step for step in steps if step.action in {"merged", "replaced"})

    @cached_property
    def deltas(self) -> tuple[PlacedDelta, ...]:
        """Every change to every stored tensor."""
        return tuple(delta for step in self.steps if isinstance(step.op, Merge) for delta in step.op.deltas)

    @cached_property
    def stored(self) -> Stored:
        """The base's tensors as layouts take them."""
        return Stored(self.base.parameters(), lambda: Conversion.of(self.base.config))

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The base's module tree; None where transformers has no class for the model."""
        return build_skeleton(self.base.config)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Modules of the base whose weight has two axes or more, as the checkpoint names them."""
        return self.base.matrices()

    def class_of(self, module: str) -> str:
        """Return the class of a module, in either spelling; empty where it is not known."""
        if self.skeleton is None:
            return ""
        classes = self.skeleton.classes
        return classes.get(module) or classes.get(self.stored.module(module), "")

    def is_grouped(self, module: str) -> bool:
        """Return True for a convolution in groups."""
        # PEFT's LoRA has groups in B too, so B A is not the change of the weight.
        model = meta_model(self.base.config)
        if model is None or self.skeleton is None:
            return False
        path = self.stored.module(module)
        return path in self.skeleton.classes and getattr(model.get_submodule(path), "groups", 1) > 1

    def is_tied(self, module: str) -> bool:
        """Return True for an end of embeddings that the model's class and config tie."""
        if self.skeleton is None:
            is_end = module.rpartition(".")[2] in INPUT_NAMES | OUTPUT_NAMES
            return is_end and bool(self.base.config.get("tie_word_embeddings"))
        return self._other_end(module) is not None

    def before(self, name: str) -> Weight | None:
        """Return the base's own weight behind one of the output; for an end of a tie the stored one; None for a new
        weight.
        """
        if name in self.stored.tensors or self.skeleton is None:
            return self.stored.tensors.get(name)
        other = self.skeleton.ends().get(f"{self.stored.module(name.removesuffix('.weight'))}.weight")
        return self.stored.tensors.get(self.stored.disk_name(other)) if other else None

    def twin(self, module: str) -> str | None:
        """Return the module at the unstored end of a tie that is kept, which changes along; else None."""
        other = self._other_end(module)
        if other is None or self.stored.disk_name(other) in self.outline.sources:
            return None
        return self._spelled_as(module, other)

    def kept_twin(self, module: str) -> str | None:
        """Return the module at the other end of a tie that is kept, asked from either end; else None."""
        other = self._other_end(module)
        if other is None:
            return None
        ends = {self.stored.disk_name(other), self.stored.disk_name(f"{self.stored.module(module)}.weight")}
        return None if ends <= self.outline.sources.keys() else self._spelled_as(module, other)

    def _spelled_as(self, module: str, other: str) -> str:
        """Return a parameter's module in the spelling (the model's, or the published one) of another module."""
        is_canonical = self.stored.module(module) == module
        name = other if is_canonical else self.stored.as_published(other)
        return name.removesuffix(".weight")

    def _other_end(self, module: str) -> str | None:
        """Return the parameter that a module's weight is tied to, in the model's spelling; None for none."""
        known = self.skeleton
        if known is None:
            return None
        return known.ends().get(f"{self.stored.module(module)}.weight")
