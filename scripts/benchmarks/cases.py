"""What is merged: the cases, and the lists of the command line that they are the product of."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qv": ("q_proj", "v_proj"),
}
"""Modules that an adapter targets, by what the command line calls them."""

KINDS = ("lora", "dora", "adalora")
"""Kinds of adapter."""

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Bytes of one value, by dtype."""


@dataclass(frozen=True, slots=True)
class Case:
    """One base and one adapter."""

    size_gb: float
    """Of the base, in 10⁹ bytes."""

    dtype: str
    targets: str
    """A name of `TARGETS`."""

    rank: int

    def __str__(self) -> str:
        return f"{self.size_gb:g} GB, {self.dtype}, targets {self.targets}, rank {self.rank}"


def cases(
    sizes_gb: Iterable[float], dtypes: Iterable[str], targets: Iterable[str], ranks: Iterable[int]
) -> list[Case]:
    """Return every combination; those that share a base stand together."""
    return [Case(*values) for values in product(sizes_gb, dtypes, targets, ranks)]


def listed(
    kind: click.ParamType[Any],
) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[Any, ...]]:
    """Return a callback that turns ``1,2`` or a repeated option into a tuple, each value once.

    Args:
        kind: what each value has to be.
    """

    def split(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[Any, ...]:
        parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
        if texts and not parts:
            raise click.BadParameter("the list is empty", ctx, param)
        return tuple(dict.fromkeys(kind.convert(part, param, ctx) for part in parts))

    return split
