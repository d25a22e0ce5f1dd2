"""A LoRA that is to be written: its modules, what the factors of each are made of, and what became of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lora_merge.core.adapter import Delta
from lora_merge.core.choices import AdapterFormat, ExpertForm, Naming
from lora_merge.core.plan import Step
from lora_merge.core.report import Issue
from lora_merge.core.tensor import TensorRef

Form = Literal["linear", "embedding", "convolution", "experts"]
"""How PEFT names and shapes the factors of a module."""


@dataclass(frozen=True, slots=True)
class Given:
    """Factors that the adapter has."""

    delta: Delta

    turned: bool = False
    """True where they are those of the transposed change."""

    part: tuple[tuple[int, int], ...] = ()
    """The part of the delta's weight that is meant, as `lora_merge.core.adapter.PlacedDelta.part` has it."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What a merge changes of a stored weight: it has no factors yet."""

    step: Step

    turned: bool = False
    """True where the weight is stored ``[in, out]``: ``Conv1D``, and an embedding as LoRA sees it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a training made of a weight."""

    before: TensorRef
    after: TensorRef
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """Factors of a part, and the part of a stack of experts that they belong to."""

    delta: Delta
    expert: int

    rows: tuple[int, int]
    """Outputs of the stacked weight."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Factors of many modules as those of one stack of experts; where there are none, nothing is changed."""

    parts: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A module that the adapter leaves alone, written all the same: its factors are zero."""


Origin = Given | Changed | Difference | Gathered | Unchanged


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module of a LoRA, or one parameter of ``target_parameters``."""

    path: str
    """As the adapter that is written names it; of ``experts``, the parameter's."""

    form: Form
    origin: Origin

    shape: tuple[int, ...]
    """Of the change as LoRA has it: ``[out, in]``, ``[out, in, *kernel]``, ``[experts, out, in]``."""

    rank: int
    """r of the factors; 0 where there are none yet."""

    scale: float = 1.0
    """What B A is multiplied by, before any transform."""

    kept: Mapping[str, TensorRef] = field(default_factory=dict)
    """What goes along as it is, by its end of the name: ``{"lora_magnitude_vector": …}``; ``lora_B.bias`` is scaled."""

    depth: int = 0
    """Of experts: how many ``base_layer`` stand in the names of the tensors."""

    @property
    def owner(self) -> str:
        """Return the module's path, of ``experts`` too."""
        return self.path.rpartition(".")[0] if self.form == "experts" else self.path

    @property
    def is_exact(self) -> bool:
        """Return True where the factors are there; False where a change has to be taken apart into some."""
        return not isinstance(self.origin, Changed | Difference)


def nested(modules: Iterable[LoraModule], parameters: Mapping[str, Sequence[str]]) -> list[LoraModule]:
    """Return modules with the names that PEFT gives several parameters of one: the last of them is outermost.

    Args:
        modules: of which some are ``experts``.
        parameters: of each module of the model, in the order of their registration.

    Reference:
        ``peft.tuners.tuners_utils.BaseTuner._inject_parameters`` (PEFT 0.21.2).
    """
    modules = list(modules)
    targeted = {module.path for module in modules if module.form == "experts"}
    found = []
    for module in modules:
        depth = 0
        if module.form == "experts":
            order = [name for name in parameters[module.owner] if f"{module.owner}.{name}" in targeted]
            depth = len(order) - 1 - order.index(module.path.rpartition(".")[2])
        found.append(replace(module, depth=depth))
    return found


@dataclass(frozen=True, slots=True)
class Keep:
    """How much of a change a truncation keeps."""

    rank: int | None = None
    """Singular values, at most."""

    energy: float | None = None
    """Share of the sum of their squares, at least."""


@dataclass(frozen=True, slots=True)
class Loss:
    """How far what is written is from what was wanted."""

    norm: float
    """‖Δ‖ of what was wanted, in the Frobenius norm."""

    residual: float
    """‖Δ - Δ′‖: no output of the module is further off than this times the length of its input."""

    @property
    def relative(self) -> float:
        """Return ‖Δ - Δ′‖ / ‖Δ‖."""
        return self.residual / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """Return the share of ‖Δ‖² that is kept."""
        return max(0.0, 1.0 - self.relative**2)


@dataclass(frozen=True, slots=True)
class Made:
    """One module whose factors are made: they wait in a file."""

    module: LoraModule
    a: TensorRef
    """``[r, in]`` or ``[experts, r, in]``."""

    b: TensorRef
    """``[out, r]`` or ``[experts, out, r]``."""

    scale: float
    loss: Loss | None

    padded: int = 0
    """The rank that it is padded to when it is written; 0: as it is."""

    @property
    def rank(self) -> int:
        """Return r, as it is written."""
        return self.padded or self.a.shape[-2]


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA, ready to be written."""

    made: tuple[Made, ...]
    config: Mapping[str, Any]
    """As PEFT has it."""

    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    """What is carried as it is, by its name in a PEFT file."""

    base_config: Mapping[str, Any] = field(default_factory=dict)
    """``config.json`` of the base, where that is at hand."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to an adapter: the transforms that a user asked for, and those that an engine or a format needs."""

    to_lora: bool = False
    keep: Keep | None = None
    bake: bool = False
    uniform: bool = False
    """Every module has one rank."""

    ranks: tuple[int, ...] = ()
    """Of which one is taken, the smallest that holds all; empty: the largest rank that there is."""

    explicit: bool = False
    """Targets are listed."""

    every_layer: bool = False
    """What is a target in one layer is one in all: with zeros, where the adapter has nothing."""

    every_name: bool = False
    """What is called as a target is one wherever it stands: with zeros, where the adapter has nothing."""

    packed: bool = False
    """Where one of q, k and v, or of gate and up, is a target, all are: with zeros."""

    without_copies: bool = False
    """Embeddings that are saved along, and equal the base's, are left out."""

    naming: Naming | None = None
    experts: ExpertForm | None = None
    dtype: str | None = None
    """A safetensors code; None: what holds the values."""

    format: AdapterFormat = "peft"

    @property
    def is_rescaled(self) -> bool:
        """Return True when every scale is folded into B."""
        return self.bake or self.keep is not None or self.uniform or self.to_lora or self.format != "peft"

    @property
    def is_renamed(self) -> bool:
        """Return True when modules have other names, or are others, than before."""
        return bool(self.naming or self.experts or self.to_lora or self.fills)

    @property
    def fills(self) -> bool:
        """Return True when modules that the adapter leaves alone are written with zeros."""
        return self.every_layer or self.every_name or self.packed

    @property
    def drops_copies(self) -> bool:
        """Return True when copies of the base's embeddings are left out."""
        return self.without_copies or self.format != "peft"

    def names(self) -> tuple[str, ...]:
        """Return the transforms in the order in which they are applied, as options are spelled."""
        done = {
            "split-experts": self.experts == "split",
            "fuse-experts": self.experts == "fuse",
            f"rename {self.naming}": self.naming is not None,
            "to-lora": self.to_lora,
            "reduce-rank": self.keep is not None,
            "bake-scale": self.is_rescaled,
            "every-layer": self.every_layer,
            "every-name": self.every_name,
            "packed": self.packed,
            "without-copies": self.without_copies,
            "pad-rank": self.uniform,
            "expand-targets": self.explicit,
            f"dtype {self.dtype}": self.dtype is not None,
        }
        return tuple(name for name, is_done in done.items() if is_done)


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one module."""

    path: str
    rank_before: int
    """0 where it had no factors."""

    rank: int
    scale: float
    dtype: str
    """Of its factors, a safetensors code."""

    loss: Loss | None = None
    """None where nothing was lost: the change is what it was, up to the rounding of float32."""


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What one conversion, or one extraction, did."""

    source: str
    """The adapter, or the tuned model, as the user named it."""

    out: str
    format: AdapterFormat
    files: tuple[str, ...]
    """What was written, relative to ``out``."""

    nbytes: int
    transforms: tuple[str, ...]
    """What was done, in order."""

    modules: tuple[Written, ...]
    n_whole: int
    """Parameters that are carried whole: ``modules_to_save``, biases, trained tokens."""

    issues: tuple[Issue, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def loss(self) -> Loss | None:
        """Return the loss of all modules together; None where nothing was lost."""
        losses = [one.loss for one in self.modules if one.loss is not None]
        if not losses:
            return None
        norm, residual = (
            sum(value**2 for value in values) ** 0.5
            for values in zip(*((one.norm, one.residual) for one in losses), strict=True)
        )
        return Loss(norm, residual)
