"""An adapter as data: which parameters it changes, with which tensors, by which scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_merge.core.checkpoint import SideFile
from lora_merge.core.facts import Facts, Reach
from lora_merge.core.report import Issue
from lora_merge.core.tensor import Region, TensorRef

PLAIN = Region()
"""All of a tensor, which is stored ``[out, in]``."""

Packing = Literal["interleaved", "expert-major", "by-expert"]
"""How B of stacked experts has their columns: the expert running fastest (PEFT), one expert's columns after the other's (Unsloth),
or each expert's matrix whole, one after the other (NeMo Automodel)."""


@dataclass(frozen=True, slots=True)
class Delta:
    """One change to one parameter, as the adapter states it."""

    parameter: str
    """As the adapter names it."""

    facts: Facts
    """Which algebra it is, and what else that algebra needs."""

    factors: Mapping[str, TensorRef]
    """Tensors by role: for ``low_rank`` ``{"A": [r, in], "B": [out, r]}``."""

    scale: float = 1.0
    """The one factor that the algebra multiplies by; the reader has folded α, r and patterns into it."""

    transposed: bool = False
    """True when the weight is ``[in, out]`` by the adapter's format: LoRA on an embedding."""

    rounded: bool = False
    """True where PEFT rounds the change to the weight's dtype before it adds it."""

    round_before_next: bool = False
    """True where PEFT stores the weight in its own dtype before the next change is made."""

    @property
    def algebra(self) -> str:
        """Name of the algebra, a key of `lora_merge.deltas.ALGEBRAS`: for example ``"low_rank"``."""
        return self.facts.algebra

    @property
    def module(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def effective_scale(self) -> float:
        """What the product of the factors is multiplied by in all: AdaLoRA divides `scale` once more."""
        return self.facts.effective_scale(self.scale)

    @property
    def rank(self) -> int:
        """r; of stacked factors that of one expert's matrix; 0 without factors."""
        return self.facts.rank(self.factors)

    def shape(self, role: str) -> tuple[int, ...]:
        """Return the shape of a factor as the formula has it (A ``[r, in]``, B ``[out, r]``), however it is stored."""
        return self.facts.shape_of(role, self.factors)

    def weight_shape(self) -> tuple[int, ...] | None:
        """Return the weight's shape in the adapter's format (``[in, out]`` where `transposed`); None if nothing tells it."""
        shape = self.facts.weight_shape(self.factors)
        return shape[::-1] if shape is not None and self.transposed else shape

    def placed(
        self,
        tensor: str,
        region: Region = PLAIN,
        *,
        part: tuple[tuple[int, int], ...] = (),
        adapter: int = 0,
        adapter_weight: float = 1.0,
        rule: str = "",
    ) -> PlacedDelta:
        """Return the change on one stored tensor; the arguments are fields of `PlacedDelta`."""
        return PlacedDelta(
            self,
            tensor,
            region,
            part,
            self.scale,
            adapter,
            adapter_weight,
            self.rounded,
            self.round_before_next,
            rule,
        )


@dataclass(frozen=True, slots=True)
class PlacedDelta:
    """A change on one stored tensor, as a plan applies it."""

    delta: Delta
    tensor: str
    """Name of the stored tensor."""

    region: Region
    """The part of the tensor that it changes, and the orientation of the stored weight."""

    part: tuple[tuple[int, int], ...]
    """The part of the adapter's own weight, a range per axis (``[out, in]``, ``[expert, out, in]``); empty: all."""

    scale: float
    """As it is applied: `Delta.scale`, times the adapter's weight where the algebra is scaled and all is added in turn."""

    adapter: int = 0
    """Which of the plan's adapters it comes from."""

    adapter_weight: float = 1.0
    """How much of the change is wanted, beside `scale`: the user's ``--adapter PATH:WEIGHT``."""

    rounded: bool = False
    """As `Delta.rounded`, but False where changes of several adapters are added up in float32."""

    round_before_next: bool = False
    """As `Delta.round_before_next`, but False where changes of several adapters are added up in float32."""

    rule: str = ""
    """The layout by which parameter and tensor were joined; names one of `lora_merge.layouts`, or ``"tied"``."""

    @property
    def algebra(self) -> str:
        """Name of the algebra; as `Delta.algebra`."""
        return self.delta.facts.algebra

    @property
    def facts(self) -> Facts:
        """What the algebra needs to know; as `Delta.facts`."""
        return self.delta.facts

    @property
    def factors(self) -> Mapping[str, TensorRef]:
        """The adapter's tensors by role; as `Delta.factors`."""
        return self.delta.factors

    @property
    def target(self) -> str:
        """What the adapter calls the parameter."""
        return self.delta.parameter

    @property
    def effective_scale(self) -> float:
        """What the product of the factors is multiplied by in all, without `adapter_weight`."""
        return self.facts.effective_scale(self.scale)

    @property
    def rank(self) -> int:
        """As `Delta.rank`."""
        return self.delta.rank

    @property
    def reach(self) -> Reach:
        """How much of the weight the change of some rows depends on, given how the weight is stored."""
        return self.facts.reach(transposed=self.region.transposed)


Reason = Literal["module", "bias", "embedding", "saved", ""]
"""What explains a whole parameter: ``modules_to_save``, ``bias``, an embedding saved along, a file or a kind of training
that is for whole parameters; or nothing does."""


@dataclass(frozen=True, slots=True)
class Replacement:
    """A whole parameter that the adapter carries."""

    ref: TensorRef
    why: Reason

    original: TensorRef | None = None
    """The base's own parameter as it was in training, where the file holds it beside the trained one. PEFT loads it into the
    base, where the other end of a tie reads it."""


@dataclass(frozen=True, slots=True)
class StackedPair:
    """An A and a B of a parameter that the file does not name: LoRA on ``target_parameters``."""

    module: str

    depth: int
    """How often ``base_layer`` occurs in the names; PEFT nests the parameters of one module, the last outermost."""

    tensors: Mapping[str, TensorRef]

    parameter: str = ""
    """Name of the parameter in its module, where the format says it; empty where only the model can tell."""

    packing: Packing | None = None
    """How B holds the experts, where the format says it."""

    inward: bool = False
    """True where B is known to have the inputs and A the outputs, so that shapes need not tell."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter directory, read from its headers and its configuration."""

    root: str

    format: str
    """Names a reader in `lora_merge.adapters`, for example ``"peft"``."""

    config: Mapping[str, Any]

    deltas: tuple[Delta, ...]

    modules: frozenset[str]
    """Every module that has tensors in the file, whether they are valid or not."""

    issues: tuple[Issue, ...]
    """Everything that is wrong with the adapter on its own; planning reports it with the rest."""

    digest: str
    """Of the files that hold the tensors; the manifest records it."""

    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    """Parameter → the whole parameter in the adapter: a trained one, or a copy that was saved along."""

    stacked: tuple[StackedPair, ...] = ()
    """Pairs whose parameter only the model can tell."""

    peft_layers: Mapping[str, TensorRef] = field(default_factory=dict)
    """Tensors of a method that PEFT's own layers merge, by their full names."""

    side_files: tuple[SideFile, ...] = ()
    """Tokenizer and template files that it carries; they win over the base's."""

    files: tuple[str, ...] = ()
    """Paths of the files that hold its tensors, its own first."""

    trainer: str = ""
    """Who wrote it, where that says what a target means: ``"ms-swift"``."""

    @property
    def is_read(self) -> bool:
        """True when something of it could be read; else its issues say why not."""
        # An adapter may have nothing but whole parameters, or only tensors that PEFT's layers merge.
        return bool(self.deltas or self.replacements or self.stacked or self.peft_layers)

    @property
    def kind(self) -> str:
        """PEFT type in capitals, for example ``"LORA"``."""
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
