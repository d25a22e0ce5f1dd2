"""The arithmetic of ``docs/scale.md``: bytes, minutes and dollars of merges into large models, from their published tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from hollows.models import MODELS as PUBLISHED
from supported import row

if TYPE_CHECKING:
    from hollows.models import Model as Published

Group = Literal["attention", "experts", "mlp", "rest"]
Storage = Literal["dense", "mixed", "base"]

DENSE_BYTES = 2.0
"""Of a value in BF16."""

LINE_SHARE = 0.8
"""Of a line's rate that transfers reach."""

LINES = ((1, 10), (1, 25), (4, 25), (16, 25))
"""Nodes, and Gbit/s of each."""


class Part(NamedTuple):
    """Tensors that are stored, and changed or not, together."""

    group: Group
    """What of the model they are; ``rest`` no adapter changes."""

    is_coded: bool
    """Whether they are quantised."""


class Held(NamedTuple):
    """What a part has."""

    values: float
    nbytes: float


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it is published, in its parts."""

    name: str
    storage: str
    parts: Mapping[Part, Held]

    @property
    def nbytes(self) -> float:
        """Return the bytes of the base."""
        return sum(held.nbytes for held in self.parts.values())

    def has_coded(self, group: Group) -> bool:
        """Return True where a group is quantised."""
        return Part(group, is_coded=True) in self.parts

    def written(self, targets: frozenset[Group], storage: Storage) -> float:
        """Return the bytes of the output.

        Args:
            targets: groups that the adapter changes.
            storage: of the output, as ``--out-storage`` names it.
        """

        def of(part: Part, held: Held) -> float:
            is_dense = storage == "dense" or (storage == "mixed" and part.group in targets)
            return held.values * DENSE_BYTES if is_dense and part.is_coded else held.nbytes

        return sum(of(*one) for one in self.parts.items())

    def kept(self, targets: frozenset[Group], storage: Storage) -> float:
        """Return the bytes that are the same in the output as in the base: a store can copy them."""
        same = ((part, held) for part, held in self.parts.items() if part.group not in targets)
        return sum(held.nbytes for part, held in same if storage != "dense" or not part.is_coded)


_SCALES = (".weight_scale_inv", ".weight_scale", ".weight_shape", "_scales")
_CODES_IN_A_BYTE = {"F8_E4M3": 1, "I32": 2, "U8": 2}


def model_of(published: Published) -> Model:
    """Return a published model in its parts."""
    changed = {f"{module.name.removesuffix('.base_layer')}." for module in published.modules("all")}
    parts: dict[Part, Held] = {}
    for tensor in published.tensors():
        path = tensor.name
        is_scale = path.endswith(_SCALES)
        part = Part(_group(path, changed), is_coded=is_scale or tensor.dtype in _CODES_IN_A_BYTE)
        values = (
            0
            if is_scale
            else _CODES_IN_A_BYTE[tensor.dtype] * tensor.nbytes
            if part.is_coded
            else math.prod(tensor.shape)
        )
        before = parts.get(part, Held(0, 0))
        parts[part] = Held(before.values + values, before.nbytes + tensor.nbytes)
    return Model(published.name, published.storage, parts)


def _group(name: str, changed: set[str]) -> Group:
    """Return the group of a tensor."""
    module = name.rpartition(".")[0] + "."
    if module not in changed or name.endswith("bias"):
        return "rest"
    return "attention" if ".self_attn." in name else "experts" if ".experts" in name else "mlp"


@cache
def models() -> tuple[Model, ...]:
    """Return the published models, in the order of the tables."""
    return tuple(model_of(one) for one in PUBLISHED.values())


ATTENTION, LAYERS = frozenset[Group]({"attention"}), frozenset[Group](("attention", "experts", "mlp"))
"""What adapters change."""


def minutes(nbytes: float, nodes: int, gbits: float) -> float:
    """Return how long nodes take to move bytes, each over a line of its own."""
    return nbytes / (nodes * gbits / 8 * 1e9 * LINE_SHARE) / 60


def lines() -> Iterator[tuple[str, str, list[float]]]:
    """Yield model, adapter with the output's storage, and figures: GB read, GB written, GB that do not travel, minutes."""
    for model in models():
        for adapter, targets, storage in outputs(model):
            out, kept = model.written(targets, storage), model.kept(targets, storage)
            most = max(model.nbytes, out)
            times = [minutes(most, *line) for line in LINES]
            gigabytes = [model.nbytes / 1e9, out / 1e9, kept / 1e9]
            name = f"{model.name}, {model.storage}"
            yield name, f"{adapter}, `{storage}`", [*gigabytes, *times, minutes(most - kept, *LINES[0])]


def outputs(model: Model) -> Iterator[tuple[str, frozenset[Group], Storage]]:
    """Yield the outputs of a model that differ: adapter, what it changes, and storage."""
    yield "any", LAYERS, "dense"
    if model.has_coded("attention"):
        yield "attention", ATTENTION, "mixed"
    yield "attention", ATTENTION, "base"
    yield "all layers", LAYERS, "base"


def table() -> str:
    """Return the table in Markdown."""
    heads = [f"{nodes} × {gbits}" for nodes, gbits in LINES]
    titles = ["model", "adapter, `--out-storage`", "base GB", "output GB", "same GB", *heads]
    titles.append("1 × 10, store copies")
    rows = [row(*titles), "| --- | --- |" + " ---: |" * (len(titles) - 2) + "\n"]
    for name, what, (base, out, kept, *times) in lines():
        figures = [f"{base:.0f}", f"{out:.0f}", f"{kept:.0f}", *(_shown(one) for one in times)]
        rows.append(row(name, what, *figures))
    return "".join(rows)


@dataclass(frozen=True, slots=True)
class Prices:
    """What a store asks for, in dollars."""

    get: float = 0.0004 / 1000
    put: float = 0.005 / 1000
    """Parts that the store copies cost the same."""

    gigabyte_month: float = 0.023
    other_region: float = 0.02
    """For each gigabyte that is read from another region of the same cloud."""

    internet: float = 0.09
    """For each gigabyte that is read from outside of the cloud. Writing is free."""


PRICES = Prices()
GET_BYTES, PART_BYTES = 8 << 20, 16 << 20
"""Of requests: blocks that are read ahead, and parts."""


def costs() -> str:
    """Return the table of costs in Markdown."""
    titles = [
        "model",
        "adapter, `--out-storage`",
        "GET",
        "parts",
        "requests $",
        "a month $",
        "region $",
        "internet $",
    ]
    rows = [row(*titles), "| --- | --- |" + " ---: |" * (len(titles) - 2) + "\n"]
    for model in models():
        for adapter, targets, storage in outputs(model):
            out = model.written(targets, storage)
            gets, puts = model.nbytes / GET_BYTES, out / PART_BYTES
            figures = (
                f"{gets:.0f}", f"{puts:.0f}", f"{gets * PRICES.get + puts * PRICES.put:.2f}",
                f"{out / 1e9 * PRICES.gigabyte_month:.1f}", f"{model.nbytes / 1e9 * PRICES.other_region:.1f}",
                f"{model.nbytes / 1e9 * PRICES.internet:.1f}",
            )  # fmt: skip
            rows.append(row(f"{model.name}, {model.storage}", f"{adapter}, `{storage}`", *figures))
    return "".join(rows)


def _shown(time: float) -> str:
    return f"{time:.0f}" if time >= 9.95 else f"{time:.1f}" if time >= 0.05 else "< 0.1"


if __name__ == "__main__":
    print(table())
