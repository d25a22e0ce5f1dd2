"""What a method is: a way in which checkpoints say that weights are quantised."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_merge.core.report import Issue
from lora_merge.core.tensor import TensorRef
from lora_merge.core.weight import Weight


class PatternError(Exception):
    """A regular expression of a configuration cannot be used."""

    def __init__(self, at: int, sentence: str) -> None:
        super().__init__(sentence)
        self.at = at
        """Which of the expressions."""


def matched(expressions: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """Return for each name the places of the expressions that match its beginning.

    It is meant for expressions that can be trusted. Those of a stranger may take for ever.

    Raises:
        PatternError: one is not a regular expression.

    Example:
        >>> matched([".*attn", "lm_head"], ["model.attn.q", "lm_head", "model.mlp"])
        [[0], [1], []]
    """
    compiled = []
    for at, expression in enumerate(expressions):
        try:
            compiled.append(re.compile(expression))
        except re.error as exc:
            raise PatternError(at, f"is not a regular expression: {exc}") from exc
    return [[at for at, one in enumerate(compiled) if one.match(name)] for name in names]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What is known of a checkpoint beside its tensors."""

    config: Mapping[str, Any]
    """``config.json``."""

    read: Callable[[TensorRef], bytes]
    """Reads a small tensor whole."""

    side: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The side files that may say how weights are quantised (`tables.SIDE_FILES`), by name, parsed."""

    metadata: Mapping[str, str] = field(default_factory=dict)
    """``__metadata__`` of the headers of all weight files together."""

    match: Callable[[Sequence[str], Sequence[str]], list[list[int]]] = matched
    """As `matched`, within limits of time and memory: the configuration's patterns may be a stranger's."""


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

        Among the others are the tensors that were meant to be parts of a weight and are not, each with an issue.

        Args:
            tensors: of a checkpoint, by name.
            around: what says how they are stored.
        """
