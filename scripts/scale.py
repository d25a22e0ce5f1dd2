"""The table of ``docs/clusters.md``: bytes and minutes of merges into large models, from their published shapes.

All of it is arithmetic, from the sizes of the linear layers. Norms, biases and routers' corrections are left out: together
they are less than a thousandth of each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from supported import row

Group = Literal["attention", "experts", "mlp", "rest"]
Storage = Literal["dense", "mixed", "base"]

DENSE_BYTES = 2.0
"""Of a value in BF16."""

FP8_BLOCKS = 1 + 4 / 128**2
"""Of a value: a code, and a scale in F32 for each block of 128 × 128."""

INT4_GROUPS = 0.5 + 2 / 32
"""Of a value: half a byte, and a scale in BF16 for each 32."""

MXFP4 = 0.5 + 1 / 32
"""Of a value: half a byte, and a scale of one byte for each 32."""

LINE_SHARE = 0.8
"""Of a line's rate that transfers reach."""

LINES = ((1, 10), (1, 25), (4, 25), (16, 25))
"""Nodes, and Gbit/s of each."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model as it is published: values of each group of tensors, and bytes of one."""

    name: str
    storage: str
    values: Mapping[Group, float]
    coded: Mapping[Group, float]
    """Bytes of a value of the groups that are quantised; all others are BF16."""

    def stored(self, group: Group) -> float:
        """Return the bytes of a group in the base."""
        return self.values[group] * self.coded.get(group, DENSE_BYTES)

    @property
    def nbytes(self) -> float:
        """Return the bytes of the base."""
        return sum(map(self.stored, self.values))

    def written(self, targets: frozenset[Group], storage: Storage) -> float:
        """Return the bytes of the output.

        Args:
            targets: groups that the adapter changes.
            storage: of the output, as ``--out-storage`` names it.
        """
        dense = {"dense": frozenset(self.values), "mixed": targets, "base": frozenset[Group]()}[storage]
        return sum(
            self.values[one] * DENSE_BYTES if one in dense else self.stored(one) for one in self.values
        )

    def kept(self, targets: frozenset[Group], storage: Storage) -> float:
        """Return the bytes that are the same in the output as in the base: a store can copy them."""
        same = (one for one in self.values if one not in targets)
        return sum(self.stored(one) for one in same if storage != "dense" or one not in self.coded)


def latent_attention(hidden: int, heads: int) -> int:
    """Return the values of one layer's attention in DeepSeek's models: low ranks of 1536 and 512, heads of 128 + 64 and 128."""
    down = hidden * (1536 + 512 + 64)
    up = 1536 * heads * (128 + 64) + 512 * heads * (128 + 128)
    return down + up + heads * 128 * hidden


def deepseek_like(n_experts: int, n_dense: int, heads: int, vocab: int, n_further: int) -> dict[Group, float]:
    """Return the values of a model with DeepSeek-V3's layers: 61, and further ones that predict more tokens."""
    hidden, expert = 7168, 3 * 7168 * 2048
    layers = 61 + n_further
    sparse = layers - n_dense
    return {
        "attention": layers * latent_attention(hidden, heads),
        "experts": sparse * n_experts * expert,
        "mlp": n_dense * 3 * hidden * 18_432 + sparse * expert,
        # Embedding and head, again in each further layer, with its projection; routers.
        "rest": (1 + n_further) * 2 * vocab * hidden
        + n_further * 2 * hidden**2
        + sparse * n_experts * hidden,
    }


def gpt_oss() -> dict[Group, float]:
    """Return the values of gpt-oss-120b: 36 layers of 128 experts, 64 heads of 64 and 8 of keys and values."""
    hidden, layers, experts, vocab = 2880, 36, 128, 201_088
    return {
        "attention": layers * hidden * 64 * (64 + 8 + 8 + 64),
        "experts": layers * experts * 3 * hidden * 2880,
        "mlp": 0,
        # Biases of experts are many here.
        "rest": 2 * vocab * hidden + layers * experts * (hidden + 3 * 2880),
    }


_LAYERS: tuple[Group, ...] = ("attention", "experts", "mlp")

MODELS = (
    Model("DeepSeek-V3", "FP8", deepseek_like(256, 3, 128, 129_280, 1), dict.fromkeys(_LAYERS, FP8_BLOCKS)),
    Model("Kimi-K2", "FP8", deepseek_like(384, 1, 64, 163_840, 0), dict.fromkeys(_LAYERS, FP8_BLOCKS)),
    Model(
        "Kimi-K2-Thinking", "INT4 experts", deepseek_like(384, 1, 64, 163_840, 0), {"experts": INT4_GROUPS}
    ),
    Model("gpt-oss-120b", "MXFP4 experts", gpt_oss(), {"experts": MXFP4}),
)

ATTENTION, LAYERS = frozenset[Group]({"attention"}), frozenset(_LAYERS)
"""What adapters change."""


def minutes(nbytes: float, nodes: int, gbits: float) -> float:
    """Return how long nodes take to move bytes, each over a line of its own."""
    return nbytes / (nodes * gbits / 8 * 1e9 * LINE_SHARE) / 60


def lines() -> Iterator[tuple[str, str, list[float]]]:
    """Yield model, adapter with the output's storage, and figures: GB read, GB written, GB that do not travel, minutes."""
    for model in MODELS:
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
    if ATTENTION & model.coded.keys():
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


def _shown(time: float) -> str:
    return f"{time:.0f}" if time >= 9.95 else f"{time:.1f}" if time >= 0.05 else "< 0.1"


if __name__ == "__main__":
    print(table())
