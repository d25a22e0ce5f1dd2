"""An adapter as data: which parameters it changes, with which tensors, by which scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge.core.checkpoint import SideFile
from lora_merge.core.report import Issue
from lora_merge.core.tensor import Region, TensorRef

PLAIN = Region()


@dataclass(frozen=True, slots=True)
class DeltaSpec:
    """One change to one parameter: the algebra's name and everything it needs."""

    kind: str
    """Names an algebra in `lora_merge.deltas`, for example ``"low_rank"``."""

    parameter: str
    """The parameter it changes, by its in-memory name: ``…q_proj.weight``."""

    tensors: Mapping[str, TensorRef]
    """By role: ``{"A": [r, in], "B": [out, r]}`` for ``low_rank``."""

    scale: float
    """The one factor that the algebra multiplies by; the reader has folded α, r and patterns into it."""

    region: Region = PLAIN

    @property
    def module(self) -> str:
        """Return the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def rank(self) -> int:
        """Return r, the number of rows of A."""
        return self.tensors["A"].shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory, read from its headers and its configuration."""

    root: str

    format: str
    """Names a reader in `lora_merge.adapters`, for example ``"peft"``."""

    config: Mapping[str, Any]

    deltas: tuple[DeltaSpec, ...]

    modules: frozenset[str]
    """Every module that has tensors, sound or not."""

    issues: tuple[Issue, ...]
    """Everything that is wrong with the adapter on its own; planning reports it with the rest."""

    digest: str
    """Of the file that holds the tensors; the manifest records it."""

    full_tensors: Mapping[str, TensorRef] = field(default_factory=dict)
    """Whole parameters that it carries, by parameter: trained ones, or copies saved along."""

    side_files: tuple[SideFile, ...] = ()
    """Tokenizer and template files that it carries; they win over the base's."""
