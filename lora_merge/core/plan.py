"""The plan: everything that will be read, computed and written, as plain frozen data."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from lora_merge.core.adapter import PlacedDelta
from lora_merge.core.checkpoint import ConfigPatch, SideFile
from lora_merge.core.facts import Reach
from lora_merge.core.report import Issue, Summary
from lora_merge.core.shards import OutputFile
from lora_merge.core.tensor import TensorRef
from lora_merge.core.view import View
from lora_merge.core.weight import Storage, Weight

Action = Literal["merged", "replaced", "cast", "copied"]


@dataclass(frozen=True, slots=True)
class Combination:
    """How the changes of several adapters become one."""

    method: str
    """Names a combination in `lora_merge.deltas`, for example ``"ties"``."""

    density: float
    """Share of the values that are kept."""

    seed: int

    rank: int
    """Singular values that ``svd`` keeps."""

    rng_key: str
    """What random numbers depend on beside the seed: the tensor's name; of a tie, the name of the first end."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How the values of a merged weight become numbers that its storage has, where that is not simply the nearest."""

    method: Literal["adapter", "stochastic"]
    """``adapter`` keeps what the deltas do to their own inputs (`lora_merge.rounding.adapter`)."""

    seed: int = 0
    rng_key: str = ""
    """As `Combination.rng_key`."""


@dataclass(frozen=True, slots=True)
class Copy:
    """The bytes of a stored tensor, as they are."""

    source: TensorRef
    op: Literal["copy"] = "copy"


@dataclass(frozen=True, slots=True)
class Merge:
    """A weight decoded to float32, changed by every delta in turn, encoded once. Without deltas, only its storage or dtype changes."""

    source: Weight
    target: Storage
    """How the result is stored."""

    deltas: tuple[PlacedDelta, ...]

    view: View
    reach: Reach = "rows"
    """The furthest that any of the deltas reaches."""

    combination: Combination | None = None
    """None: every delta is applied in turn."""

    held_bytes: int = 0
    """Bytes that are in memory for every tile: packed codes that run across the rows, those read and those written."""

    rounding: Rounding | None = None
    """None: every value becomes the nearest number."""

    on_stored_grid: bool = False
    """True where the source's own scales are kept, and only its codes are written."""

    fills_across: bool = False
    """True where the codes that are written run across the rows: several tiles fill one buffer."""

    surveyed: tuple[Merge, ...] = ()
    """Weights that are loaded as one with this one, where a scale depends on the values of all of them."""

    multiple: int = 1
    """Each tile begins at a multiple of this number of rows of its matrix; 0 for tiles of whole matrices."""

    op: Literal["merge"] = "merge"

    @property
    def between_dtype(self) -> str:
        """The dtype that a change is rounded to before it is added, where PEFT rounds it: that of the output, or what it would
        have if it were dense. On stored scales there is no such dtype, and float32 it is.
        """
        if self.target.is_dense:
            return self.target.dtype
        return "F32" if self.on_stored_grid else "BF16"

    def tiles(self, elements: int | None = None) -> list[tuple[int, int]]:
        """Return the row ranges to work on, in order; see `View.tiles`."""
        if self.reach == "tensor":
            return [(0, self.view.n_rows)]
        return self.view.tiles(elements, self.multiple or self.view.rows)


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work: it reads its inputs and fills its own places, and needs no other step."""

    name: str
    """Of the parameter that it makes; of a copied part of one, the part's own name."""

    writes: Mapping[str, TensorRef]
    """Role → place in the output, the main part's first."""

    op: Copy | Merge

    replaced: bool = False
    """True when the source is the adapter's own tensor."""

    @property
    def slots(self) -> tuple[TensorRef, ...]:
        """Places in the output, the main part's first."""
        return tuple(self.writes.values())

    @property
    def main(self) -> TensorRef:
        """Place of the main part, whose record speaks for the values."""
        return next(iter(self.writes.values()))

    @property
    def reads(self) -> Mapping[str, TensorRef]:
        """Role → the stored tensors that are copied or changed; factors are not among them."""
        if isinstance(self.op, Merge):
            return self.op.source.parts
        return dict.fromkeys(self.writes, self.op.source)

    @property
    def source(self) -> Weight:
        """The weight that is copied or changed; a copied tensor counts as a dense weight."""
        return self.op.source if isinstance(self.op, Merge) else Weight.dense(self.op.source)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter, as the model has it."""
        return self.op.source.shape

    @property
    def action(self) -> Action:
        """What the step does to its tensor; ``"cast"`` changes nothing but its storage."""
        if isinstance(self.op, Merge) and self.op.deltas:
            return "merged"
        if self.replaced:
            return "replaced"
        return "copied" if isinstance(self.op, Copy) else "cast"

    @property
    def nbytes(self) -> int:
        """Bytes that the step writes, over all parts."""
        return sum(slot.nbytes for slot in self.writes.values())


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Everything that a merge will read, compute and write."""

    base: str
    """Root of the base checkpoint."""

    adapters: tuple[str, ...]
    """Roots of the adapters, in the order their deltas are applied."""

    weights: tuple[float, ...]
    """How much of each adapter is wanted."""

    files: tuple[OutputFile, ...]
    steps: tuple[Step, ...]
    """In the order of the output's bytes."""

    side_files: tuple[SideFile, ...]
    config_patch: ConfigPatch
    """What changes in ``config.json``; nothing when the file is copied as it is."""

    index: str
    """Text of the index file; empty when the output is a single file without one."""

    issues: tuple[Issue, ...]
    """Warnings and notes; a plan with errors is never made."""

    quantised: Mapping[str, int] = field(default_factory=dict)
    """As `Summary.quantised`."""

    def to_json(self) -> str:
        """Return the plan as JSON text, which `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MergePlan:
        """Return the plan that `to_json` wrote.

        Raises:
            ValueError: the text is not such a plan.
        """
        from pydantic import TypeAdapter

        plan: MergePlan = TypeAdapter(cls).validate_json(text)
        return plan

    def disk_bytes(self) -> int:
        """Return the bytes that the planned files take: weights, side files and index."""
        # An untrusted name may have half of a surrogate pair, which strict UTF-8 refuses.
        small = sum(file.nbytes for file in self.side_files) + len(
            self.index.encode("utf-8", "backslashreplace")
        )
        return small + sum(file.nbytes for file in self.files)

    def summary(self, n_workers: int = 0, peak_bytes: int = 0, disk_free_bytes: int = 0) -> Summary:
        """Return the plan in numbers, with those of the machine that is to carry it out: they are only passed on."""
        deltas = [delta for step in self.steps if isinstance(step.op, Merge) for delta in step.op.deltas]
        sizes: dict[Action, list[int]] = {"merged": [], "replaced": [], "cast": [], "copied": []}
        for step in self.steps:
            sizes[step.action].append(step.nbytes)
        return Summary(
            n_merged=len(sizes["merged"]),
            n_replaced=len(sizes["replaced"]),
            n_cast=len(sizes["cast"]),
            n_copied=len(sizes["copied"]),
            merged_bytes=sum(sizes["merged"]),
            replaced_bytes=sum(sizes["replaced"]),
            cast_bytes=sum(sizes["cast"]),
            copied_bytes=sum(sizes["copied"]),
            n_shards=len(self.files),
            n_side_files=len(self.side_files),
            ranks=_count([str(delta.rank) for delta in deltas if delta.facts.has_factors]),
            scales=_count([f"{delta.effective_scale:g}" for delta in deltas if delta.facts.has_factors]),
            kinds=_count([delta.algebra for delta in deltas]),
            module_ranks=_module_ranks(deltas),
            n_workers=n_workers,
            peak_bytes=peak_bytes,
            disk_needed_bytes=self.disk_bytes(),
            disk_free_bytes=disk_free_bytes,
            quantised=self.quantised,
        )


def _module_ranks(deltas: list[PlacedDelta]) -> dict[str, int]:
    """Return the rank of each parameter's change: the sum over the adapters that have one."""
    ranks: dict[str, dict[int, int]] = {}
    for delta in deltas:
        if delta.facts.has_factors:
            own = ranks.setdefault(delta.tensor, {})
            # Several deltas of one adapter are mostly on different parts (experts): their ranks do not add up.
            own[delta.adapter] = max(own.get(delta.adapter, 0), delta.rank)
    return {parameter: sum(own.values()) for parameter, own in ranks.items()}


def _count(values: list[str]) -> dict[str, int]:
    counts = Counter(values)
    # By length first, so that numbers come in the order of their size: "8" before "16".
    return {value: counts[value] for value in sorted(counts, key=lambda text: (len(text), text))}
