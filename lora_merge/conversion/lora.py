"""A LoRA to be written, as values: its modules, the origin of their factors, and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lora_merge.core.adapter import Delta
from lora_merge.core.plan import Step
from lora_merge.core.report import Issue
from lora_merge.core.tensor import TensorRef
from lora_merge.core.weight import Weight
from lora_merge.requests.choices import AdapterFormat, ExpertForm, Naming

Form = Literal["linear", "embedding", "convolution", "experts"]
"""How PEFT names and shapes the factors of a module."""


@dataclass(frozen=True, slots=True)
class Given:
    """Factors that the adapter stores."""

    delta: Delta

    turned: bool = False
    """True if B A is the transposed change, ``[in, out]``."""

    part: tuple[tuple[int, int], ...] = ()
    """The part of the delta's weight that is used; see `lora_merge.core.adapter.PlacedDelta.part`. Empty: all of it."""


@dataclass(frozen=True, slots=True)
class Changed:
    """The change that a merge would make to a stored weight. It has no factors yet."""

    step: Step

    turned: bool = False
    """True if the weight is stored as ``[in, out]``: ``Conv1D``, or an embedding as LoRA sees it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of a weight after and before a training, each decoded. It has no factors yet."""

    before: Weight
    after: Weight
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """Factors of one expert's matrix, and its place in a stack of experts."""

    delta: Delta
    expert: int

    rows: tuple[int, int]
    """Range of outputs in the stacked weight: start, end."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """Factors of many experts, gathered in one stack. Experts without factors get zeros."""

    parts: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A module that the adapter does not change, written with factors of zeros because an engine expects it."""


Origin = Given | Changed | Difference | Gathered | Unchanged


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One module of a LoRA, or one parameter of ``target_parameters``."""

    path: str
    """Path in the written adapter. For ``experts``, the path of the parameter."""

    form: Form
    origin: Origin

    shape: tuple[int, ...]
    """Shape of the change: ``[out, in]``, ``[out, in, *kernel]`` or ``[experts, out, in]``."""

    rank: int
    """r of the factors; 0 if there are none yet."""

    scale: float = 1.0
    """Multiplier of B A, before any transform."""

    kept: Mapping[str, TensorRef] = field(default_factory=dict)
    """Other tensors of the module, by the end of their name: ``{"lora_magnitude_vector": …}``. They are copied; only
    ``lora_B.bias`` is scaled with B."""

    depth: int = 0
    """For experts: how many ``base_layer`` parts the names of the tensors have."""

    @property
    def owner(self) -> str:
        """The path of the module itself: for ``experts``, the path without the parameter."""
        return self.path.rpartition(".")[0] if self.form == "experts" else self.path

    @property
    def is_exact(self) -> bool:
        """True if the factors exist already; False if a change has to be decomposed."""
        return not isinstance(self.origin, Changed | Difference)


def nested(modules: Iterable[LoraModule], parameters: Mapping[str, Sequence[str]]) -> list[LoraModule]:
    """Return modules with the depth at which PEFT nests several parameters of one module: the last is outermost, at 0.

    Args:
        modules: any; only those of the form ``experts`` change.
        parameters: the names of each module's parameters, in the order of their registration.

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
    """How much of a change a truncation keeps. If both are given, the smaller rank is taken."""

    rank: int | None = None
    """Number of singular values that are kept, at most."""

    energy: float | None = None
    """Share of the sum of their squares that is kept at least, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Distance between the change that was wanted, Δ, and the one that is written, Δ′; Frobenius norms."""

    norm: float
    """‖Δ‖."""

    residual: float
    """‖Δ - Δ′‖. It bounds the error of the module's output, relative to the length of its input."""

    @property
    def relative(self) -> float:
        """‖Δ - Δ′‖ / ‖Δ‖; 0 for a change of zero."""
        return self.residual / self.norm if self.norm else 0.0

    @property
    def energy(self) -> float:
        """The share of ‖Δ‖² that is kept, from 0 to 1."""
        return max(0.0, 1.0 - self.relative**2)


@dataclass(frozen=True, slots=True)
class Made:
    """One module whose factors are computed. They wait in a temporary file."""

    module: LoraModule
    a: TensorRef
    """``[r, in]`` or ``[experts, r, in]``."""

    b: TensorRef
    """``[out, r]`` or ``[experts, out, r]``."""

    scale: float
    loss: Loss | None

    padded: int = 0
    """The rank to which it is padded when it is written; 0: no padding."""

    @property
    def rank(self) -> int:
        """The rank r as it is written, padding included."""
        return self.padded or self.a.shape[-2]


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA, ready for a writer."""

    made: tuple[Made, ...]
    config: Mapping[str, Any]
    """Fields of ``adapter_config.json``."""

    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    """Tensors that are carried whole, by their names in a PEFT file."""

    base_config: Mapping[str, Any] = field(default_factory=dict)
    """``config.json`` of the base; empty if there is no base."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to an adapter: what the user asked for, and what the engine and the output's format need."""

    to_lora: bool = False
    keep: Keep | None = None
    bake: bool = False
    uniform: bool = False
    """True if all modules get the same rank."""

    ranks: tuple[int, ...] = ()
    """Ranks allowed for that: the smallest that holds all modules is taken. Empty: the largest rank of a module."""

    explicit: bool = False
    """True if ``target_modules`` lists the modules one by one."""

    every_layer: bool = False
    """True if a target in one layer becomes one in all layers, with zeros where the adapter has no factors."""

    every_name: bool = False
    """True if every module with the name of a target becomes one, with zeros where the adapter has no factors."""

    packed: bool = False
    """True if a target among q, k and v, or gate and up, makes the others targets too, with zeros."""

    without_copies: bool = False
    """True if saved embeddings that equal the base's are left out."""

    naming: Naming | None = None
    experts: ExpertForm | None = None
    dtype: str | None = None
    """A safetensors code; None: the adapter's own dtype where it is exact, otherwise float32."""

    format: AdapterFormat = "peft"

    @property
    def is_rescaled(self) -> bool:
        """True if every scale is folded into B, so that α/r is 1."""
        # A truncation puts the scale into its factors, one rank leaves one α, and formats other than PEFT's
        # have no α per module.
        return self.bake or self.keep is not None or self.uniform or self.to_lora or self.format != "peft"

    @property
    def is_renamed(self) -> bool:
        """True if the modules, or their names, differ from those of the source."""
        return bool(self.naming or self.experts or self.to_lora or self.fills)

    @property
    def fills(self) -> bool:
        """True if modules that the adapter does not change are written with zeros."""
        return self.every_layer or self.every_name or self.packed

    @property
    def drops_copies(self) -> bool:
        """True if saved copies of the base's embeddings are left out."""
        # Other formats cannot carry whole tensors, so a copy would make them refuse the adapter.
        return self.without_copies or self.format != "peft"

    def names(self) -> tuple[str, ...]:
        """Return the transforms in the order in which they are applied, by the names of their options."""
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
    """The report on one module."""

    path: str
    rank_before: int
    """r of the source's factors; 0 if it had none."""

    rank: int
    scale: float
    dtype: str
    """Of the written factors, a safetensors code."""

    loss: Loss | None = None
    """None if nothing was lost, apart from the rounding of float32."""


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """The report on one conversion or extraction."""

    source: str
    """The adapter, or the tuned model, as the user named it."""

    out: str
    format: AdapterFormat
    files: tuple[str, ...]
    """Written files, relative to ``out``."""

    nbytes: int
    transforms: tuple[str, ...]
    """Names of the transforms, in the order in which they were applied."""

    modules: tuple[Written, ...]
    n_whole: int
    """Number of tensors that were carried whole: ``modules_to_save``, biases, trained tokens."""

    issues: tuple[Issue, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    pushed: str = ""
    """Where the Hub shows it, or its open pull request."""

    @property
    def loss(self) -> Loss | None:
        """The loss of all modules together; None if nothing was lost."""
        losses = [one.loss for one in self.modules if one.loss is not None]
        if not losses:
            return None
        norm, residual = (
            # Frobenius norms of separate matrices add up in squares.
            sum(value**2 for value in values) ** 0.5
            for values in zip(*((one.norm, one.residual) for one in losses), strict=True)
        )
        return Loss(norm, residual)

    @property
    def kept(self) -> str:
        """How much of the adapter was kept, in words."""
        return "nothing lost" if self.loss is None else f"{self.loss.energy:.2%} of the energy kept"
