"""An adapter on its base, as a conversion needs it: what a plan found, and how the base names things."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, Checkpoint
from lora_merge.core.conversion import Conversion
from lora_merge.core.plan import Merge, MergePlan
from lora_merge.core.skeleton import Skeleton, build_skeleton, meta_model
from lora_merge.layouts import Stored

if TYPE_CHECKING:
    from lora_merge.core.adapter import PlacedDelta
    from lora_merge.core.plan import Step
    from lora_merge.core.tensor import TensorRef


@dataclass(frozen=True)
class Joined:
    """A base, and the plan of a merge into it."""

    base: Checkpoint
    plan: MergePlan

    unchanged: frozenset[str] = frozenset()
    """Whole parameters in the adapter that are but copies of the base's."""

    @cached_property
    def stored(self) -> Stored:
        """Return the base's tensors as layouts look at them."""
        return Stored(self.base.by_name(), lambda: Conversion.of(self.base.config))

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """Return the module tree; None where transformers has no class for the model."""
        return build_skeleton(self.base.config)

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """Return what a merge changes."""
        return tuple(step for step in self.plan.steps if step.action in {"merged", "replaced"})

    @cached_property
    def deltas(self) -> tuple[PlacedDelta, ...]:
        """Return what is done to every stored tensor."""
        return tuple(delta for step in self.steps if isinstance(step.op, Merge) for delta in step.op.deltas)

    @cached_property
    def modules(self) -> frozenset[str]:
        """Return every module of the base with a matrix for its weight, as the checkpoint names it."""
        return self.base.matrices()

    def class_of(self, module: str) -> str:
        """Return the class of a module, in whichever spelling; empty where it is not known."""
        if self.skeleton is None:
            return ""
        classes = self.skeleton.classes
        return classes.get(module) or classes.get(self.stored.module(module), "")

    def is_grouped(self, module: str) -> bool:
        """Return True for a convolution in groups: B has groups too in PEFT's LoRA, and B A is no change of the weight."""
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

    def before(self, name: str) -> TensorRef | None:
        """Return the base's own tensor behind one of the output: of a tie, the one that is stored; None for a new one."""
        if name in self.stored.tensors or self.skeleton is None:
            return self.stored.tensors.get(name)
        other = self.skeleton.ends().get(f"{self.stored.module(name.removesuffix('.weight'))}.weight")
        return self.stored.tensors.get(self.stored.disk_name(other)) if other else None

    def twin(self, module: str) -> str | None:
        """Return the other end of a tie that the merge keeps: what is changed at one end is changed at both."""
        other = self._other_end(module)
        if other is None or self.stored.disk_name(other) in self._written:
            return None
        return self._spelled_as(module, other)

    def kept_twin(self, module: str) -> str | None:
        """Return the other end of a tie that the merge keeps, of whichever end; None where it writes both, or none is tied."""
        other = self._other_end(module)
        if other is None:
            return None
        ends = {self.stored.disk_name(other), self.stored.disk_name(f"{self.stored.module(module)}.weight")}
        return None if ends <= self._written else self._spelled_as(module, other)

    def _spelled_as(self, module: str, other: str) -> str:
        """Return the module of a parameter in the spelling that another module has."""
        is_canonical = self.stored.module(module) == module
        name = other if is_canonical else self.stored.as_published(other)
        return name.removesuffix(".weight")

    def _other_end(self, module: str) -> str | None:
        """Return the parameter that a module's weight is tied to."""
        known = self.skeleton
        if known is None:
            return None
        return known.ends().get(f"{self.stored.module(module)}.weight")

    @cached_property
    def _written(self) -> frozenset[str]:
        return frozenset(slot.name for step in self.plan.steps for slot in step.slots)
