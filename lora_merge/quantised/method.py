"""What a method is: a way in which checkpoints say that weights are quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_merge.core.report import Issue
from lora_merge.core.tensor import TensorRef
from lora_merge.core.weight import Weight


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a checkpoint beside its tensors."""

    config: Mapping[str, Any]
    """``config.json``."""

    read: Callable[[TensorRef], bytes]
    """Reads a small tensor whole."""

    side: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The side files that may say how weights are quantised, by name, parsed."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """``__metadata__`` of the headers of all weight files together."""


@dataclass(frozen=True, slots=True)
class Found:
    """The weights of a checkpoint, and what is wrong with how they are stored."""

    weights: Mapping[str, Weight]
    others: tuple[TensorRef, ...] = ()
    """Tensors that belong to no weight."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What says how they are quantised; see `Checkpoint.quantisation`."""

    issues: tuple[Issue, ...] = ()


class Method(Protocol):
    """One way to say it: the value of ``quant_method``, mostly."""

    def identify(self, tensors: Mapping[str, TensorRef], around: Surroundings) -> Found:
        """Return the weights that are stored in this way; none where the configuration speaks of another.

        Args:
            tensors: of a checkpoint, by name.
            around: what says how they are stored.
        """
