"""The weights of llama.cpp that get LoRA, and how A and B of each are made from the factors of modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import frexp
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.lora import Made
    from lora_merge.conversion.writers.lora_writer import LoadFactors

EXPERT = re.compile(r".+\.experts(\.(?P<index>\d+))?\.(?P<part>[^.]+)")

Produce = Callable[["LoadFactors"], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A weight of llama.cpp, and the rows of a module in it."""

    name: str
    """llama.cpp's name, ``blk.0.attn_q.weight``; empty if it has none."""

    rows: Sequence[int]
    """Indices of the module's outputs, in llama.cpp's order."""

    factor: float | Sequence[float] = 1.0
    """Factor by which llama.cpp's converter multiplies the weight, or one for each row."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One weight of llama.cpp that gets LoRA."""

    name: str
    rank: int
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    dtype: str
    produce: Produce
    """Returns A and B of scale 1, in llama.cpp's order of rows."""

    def under(self, alpha: int) -> GgufTensor:
        """Return the tensor for a file with this α, in a dtype that holds B · r/α exactly; else float32."""
        ratio = self.rank / alpha
        # A power of two changes the exponent alone, of which BF16 has as many bits as float32; F16 could
        # underflow.
        is_exact = ratio == 1 or (self.dtype == "BF16" and frexp(ratio)[0] == 0.5)
        return self if is_exact else replace(self, dtype="F32")


def tensor_of(made: Made, place: WeightPart) -> GgufTensor:
    """Return a weight that is one module, or a part of one."""
    *stack, _, n_in = made.module.shape
    # llama.cpp has A of an embedding transposed.
    a_shape = (n_in, made.rank) if made.module.form == "embedding" else (*stack, made.rank, n_in)
    dtype = _dtype([made]) if place.factor == 1 else "F32"
    produce = partial(_placed, made, place)
    return GgufTensor(place.name, made.rank, a_shape, (*stack, len(place.rows), made.rank), dtype, produce)


def stack_of(name: str, n_experts: int, members: Sequence[tuple[Made, WeightPart]]) -> GgufTensor:
    """Return a weight for all experts of a layer; experts without factors, or with fewer, get zeros."""
    first, place = members[0]
    rank = max(made.rank for made, _ in members)
    a_shape, b_shape = (n_experts, rank, first.module.shape[1]), (n_experts, len(place.rows), rank)
    produce = partial(_stacked, tuple(members), a_shape, b_shape)
    return GgufTensor(name, rank, a_shape, b_shape, _dtype([made for made, _ in members]), produce)


def _placed(made: Made, place: WeightPart, factors: LoadFactors) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    a, b = factors(made)
    if place.rows != range(b.shape[-2]):
        b = b[..., list(place.rows), :]
    if place.factor != 1:
        b = b.float() * torch.tensor(place.factor, dtype=torch.float32).reshape(-1, 1)
    return a.mT.contiguous() if made.module.form == "embedding" else a, b.contiguous()


def _stacked(
    members: tuple[tuple[Made, WeightPart], ...],
    a_shape: tuple[int, ...],
    b_shape: tuple[int, ...],
    factors: LoadFactors,
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    a, b = torch.zeros(a_shape), torch.zeros(b_shape)
    for made, place in members:
        n = number_of_expert(made.module.path)
        own_a, own_b = _placed(made, place, factors)
        a[n, : made.rank] = own_a
        b[n, :, : made.rank] = own_b
    return a, b


def number_of_expert(path: str) -> int:
    """Return which expert of its layer a module is, counted from 0.

    Example:
        >>> number_of_expert("model.layers.0.mlp.experts.17.up_proj")
        17
    """
    match = EXPERT.fullmatch(path)
    assert match is not None
    return int(match["index"])


def _dtype(members: Sequence[Made]) -> str:
    """Return the dtype of a weight's factors: float32 if they differ, or llama.cpp has no such dtype."""
    dtypes = {dtype for made in members for dtype in (made.a.dtype, made.b.dtype)}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {"BF16", "F16"} else "F32"
