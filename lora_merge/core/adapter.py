"""An adapter as data: which parameters it changes, with which tensors, by which scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    """The parameter it changes: as the adapter names it, and in a plan the stored tensor."""

    tensors: Mapping[str, TensorRef]
    """By role: ``{"A": [r, in], "B": [out, r]}`` for ``low_rank``."""

    scale: float
    """The one factor that the algebra multiplies by; the reader has folded α, r and patterns into it."""

    region: Region = PLAIN

    part: tuple[tuple[int, int], ...] = ()
    """The part of the adapter's own weight that is meant, a range per axis (``[out, in]``; of stacked factors
    ``[expert, out, in]``); empty for all of it."""

    rounded: bool = False
    """True where PEFT rounds the delta to the weight's dtype before it adds it."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the algebra needs, as its docstring says."""

    weight: float = 1.0
    """How much of the change is wanted: the user's ``--adapter PATH:WEIGHT``."""

    adapter: int = 0
    """Which of the plan's adapters it comes from."""

    target: str = ""
    """What the adapter calls the parameter, once `parameter` is the stored tensor's name."""

    rule: str = ""
    """The layout by which the two were joined; names one of `lora_merge.layouts`, or ``"tied"``."""

    @property
    def module(self) -> str:
        """Return the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def factor(self) -> float:
        """Return what the product of the factors is multiplied by in all."""
        return self.scale / float(self.options.get("divisor", 1.0))

    @property
    def rank(self) -> int:
        """Return r, the number of rows of A (of one expert's A, where experts are stacked); 0 without an A."""
        return self.shape("A")[0] // int(self.options.get("experts", 1)) if "A" in self.tensors else 0

    def shape(self, role: str) -> tuple[int, ...]:
        """Return the shape of a factor as the formula has it: turned round where it is stored so (``turned``)."""
        shape = self.tensors[role].shape
        return shape[::-1] if self.options.get("turned") and role in {"A", "B"} else shape


Reason = Literal["module", "bias", "embedding", "saved", ""]
"""What explains a whole parameter: ``modules_to_save``, ``bias``, an embedding saved along, a file or a kind of training
that is for whole parameters; or nothing does."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A whole parameter that the adapter carries."""

    ref: TensorRef
    why: Reason

    original: TensorRef | None = None
    """What the base's own parameter was in the training, where the file has it beside the trained one. PEFT loads it into
    the base: it is what the other end of a tie reads."""


@dataclass(frozen=True, slots=True)
class StackedPair:
    """An A and a B of a parameter that the file does not name: LoRA on ``target_parameters``."""

    module: str

    depth: int
    """How many ``base_layer`` stand in the names; PEFT nests the parameters of one module, the last outermost."""

    tensors: Mapping[str, TensorRef]

    parameter: str = ""
    """Name of the parameter in its module, where the format says it; empty where only the model can tell."""

    packing: str = ""
    """How B holds the experts: an option of `lora_merge.deltas.factors`; empty for PEFT's way."""

    inward: bool = False
    """True where B is known to have the inputs and A the outputs, so that shapes need not tell."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory, read from its headers and its configuration."""

    root: str

    format: str
    """Names a reader in `lora_merge.adapters`, for example ``"peft"``."""

    config: Mapping[str, Any]

    deltas: tuple[DeltaSpec, ...]

    modules: frozenset[str]
    """Every module that has tensors of its own, sound or not."""

    issues: tuple[Issue, ...]
    """Everything that is wrong with the adapter on its own; planning reports it with the rest."""

    digest: str
    """Of the files that hold the tensors; the manifest records it."""

    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    """Whole parameters that it carries, by parameter: trained ones, or copies saved along."""

    stacked: tuple[StackedPair, ...] = ()
    """Pairs whose parameter only the model can tell."""

    layered: Mapping[str, TensorRef] = field(default_factory=dict)
    """Tensors of a method that PEFT's own layers merge, by their full names."""

    side_files: tuple[SideFile, ...] = ()
    """Tokenizer and template files that it carries; they win over the base's."""

    files: tuple[str, ...] = ()
    """Paths of the files that hold its tensors, its own first."""

    trainer: str = ""
    """Who wrote it, where that says what a target means: ``"ms-swift"``."""

    @property
    def is_read(self) -> bool:
        """Return True when something of it could be read; else its issues say why not."""
        return bool(self.deltas or self.replacements or self.stacked or self.layered)

    @property
    def kind(self) -> str:
        """Return the PEFT type, ``"LORA"`` for example."""
        return str(self.config.get("peft_type"))


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """One adapter of a merge: how much of it is wanted, and what was found out by looking at its files."""

    adapter: Adapter
    weight: float = 1.0

    own_side_files: frozenset[str] = frozenset()
    """Names of its side files that differ from the base's."""

    unchanged: frozenset[str] = frozenset()
    """Whole parameters in it that equal the base's."""

    differing: Mapping[str, int] = field(default_factory=dict)
    """Copies of the base's embeddings in it that differ from the base's: parameter → how many of the rows that both have."""

    is_idle: bool = False
    """True when none of its deltas can change anything: of each, one factor is zero throughout, or the scale is 0."""

    displaced: frozenset[str] = frozenset()
    """Names of the base's side files whose place its own take: modules of sentence-transformers, folder by folder."""

    issues: tuple[Issue, ...] = ()
    """What its files and the base's together show."""
