"""Small weights of which each bit is known, for what quantises: the same in every environment and release of torch."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

RECORDED = Path(__file__).parents[1] / "fixtures" / "quantising.json"
"""What the libraries made of these weights: digests of every tensor, and the configuration."""


class Model(NamedTuple):
    """The shape of a Llama of one layer."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int


MODELS = {
    # Blocks of 128 fit all of its weights.
    "even": Model(256, 384, 4, 2, 64),
    # No block fits; k and v have twelve rows, so that the last word of their zeros is half full.
    "ragged": Model(192, 320, 16, 1, 12),
    # Rows that are zero, tiny, huge or full of ties; a weight and a block of zeros.
    "edges": Model(128, 256, 4, 4, 32),
}

SCHEMES = (
    "fp8",
    "fp8-block",
    "fp8-channel",
    "int8",
    "int4",
    "int4-asym",
    "int4-g32",
    "int4-asym-g32",
    "mxfp4",
    "mxfp8",
    "nvfp4",
)

FITTING = [
    (scheme, model)
    for scheme in SCHEMES
    for model in MODELS
    if not (model == "ragged" and scheme in ("int4", "int4-asym"))
]
"""Every scheme with the models that it fits: no group of 128 fits the ragged one."""


def shapes_of(model: Model) -> dict[str, tuple[int, int]]:
    """Return the shapes of the linear layers, by module."""
    wide, narrow = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = {
        "q_proj": (wide, model.hidden),
        "k_proj": (narrow, model.hidden),
        "v_proj": (narrow, model.hidden),
        "o_proj": (model.hidden, wide),
    }
    mlp = {
        "gate_proj": (model.intermediate, model.hidden),
        "up_proj": (model.intermediate, model.hidden),
        "down_proj": (model.hidden, model.intermediate),
    }
    found = {f"self_attn.{name}": shape for name, shape in attention.items()}
    found |= {f"mlp.{name}": shape for name, shape in mlp.items()}
    return {f"model.layers.0.{name}": shape for name, shape in found.items()}


@functools.cache
def weights_of(kind: str) -> dict[str, torch.Tensor]:
    """Return the weights of a model in bfloat16, by module. They are kept, and not to be changed."""
    import torch

    found = {}
    for number, (module, shape) in enumerate(shapes_of(MODELS[kind]).items()):
        weight = drawn(shape, number)
        if kind == "edges":
            weight = with_edges(weight)
            if module.endswith("o_proj"):
                weight.zero_()
            if module.endswith("down_proj"):
                weight[:, 128:] = 0.0
        found[module] = weight.to(torch.bfloat16)
    return found


def drawn(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Return numbers that look like weights, float32: sums of four uniform ones, with another spread in each row.

    All of it is arithmetic of integers, so that no library's random numbers matter.
    """
    import torch

    rows, columns = shape
    n = torch.arange(rows * columns, dtype=torch.int64) + (seed + 1) * 1_000_003
    total = torch.zeros_like(n)
    for draw in range(4):
        mixed = (n * 4 + draw) * 2_654_435_761 % 2**32
        mixed = (mixed ^ (mixed >> 15)) * 2_246_822_519 % 2**32
        mixed = (mixed ^ (mixed >> 13)) * 3_266_489_917 % 2**32
        total += (mixed ^ (mixed >> 16)) & 0xFFFF
    row = torch.arange(rows).unsqueeze(1) % 7 + 1
    return (total.view(shape) - 2 * 0xFFFF).float() * row * 2.0**-21


def with_edges(weight: torch.Tensor) -> torch.Tensor:
    """Return numbers with rows that are unlike weights."""
    import torch

    found = weight.clone()
    found[0::8] = 0.0
    found[1::8] *= 2.0**-120  # subnormal ones among them
    found[2::8] = (found[2::8] * 64).round() / 8  # ties of every grid
    found[3::8] *= 2.0**60
    found[4::8, ::2] = -0.0
    found[5::8, 5] = 30.0  # the others of its group round to zero, some of them from below
    found[6::8, 32:64] = 0.0
    found[7::8] = torch.where(found[7::8] > 0, found[7::8], found[7::8] * 2.0**-90)
    return found


def digest_of(tensor: torch.Tensor) -> str:
    """Return dtype, shape and a digest of all bytes, the sign of zero included."""
    import torch

    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:20]}"
