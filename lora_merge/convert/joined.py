"""An adapter on its base, as a conversion needs it: what a plan found, and how the base names things."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import Checkpoint
from lora_merge.core.conversion import Conversion
from lora_merge.core.plan import Merge, MergePlan
from lora_merge.core.skeleton import Skeleton, build_skeleton, meta_model
from lora_merge.layouts import Stored

if TYPE_CHECKING:
    from lora_merge.core.adapter import DeltaSpec
    from lora_merge.core.plan import Step


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
    def deltas(self) -> tuple[DeltaSpec, ...]:
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

    def twin(self, module: str) -> str | None:
        """Return the other end of a tie that the merge keeps: what is changed at one end is changed at both."""
        known = self.skeleton
        if known is None:
            return None
        path = self.stored.module(module)
        other = known.ends().get(f"{path}.weight")
        if other is None or self.stored.disk_name(other) in self._written:
            return None
        name = other if path == module else self.stored.as_published(other)
        return name.removesuffix(".weight")

    @cached_property
    def _written(self) -> frozenset[str]:
        return frozenset(slot.name for step in self.plan.steps for slot in step.slots)
