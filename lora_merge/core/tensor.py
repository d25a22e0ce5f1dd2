"""A tensor before its values are read: a name, a dtype, a shape and a place in a file.

Axis letters used in every docstring: ``W [out, in]`` is a linear weight, ``A [r, in]`` and
``B [out, r]`` are low-rank factors, ``r`` is the rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Width in bits of every safetensors dtype code (safetensors 0.8, ``Dtype``)."""

MAX_NAME_CHARACTERS = 1000
"""Of a tensor's name; those of models have about a hundred. The work on a name grows with the square of its length."""

MAX_DIMENSIONS = 64
"""Of a tensor; as many as NumPy's may have."""

TORCH_NAMES: Mapping[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The floating dtypes that merge, as safetensors and as torch (and ``config.json``) spell them."""

TORCH_TYPES: Mapping[str, str] = {
    **TORCH_NAMES,
    "F64": "float64",
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
"""What an adapter may hold beside factors: indices and masks."""

STORED_TYPES: Mapping[str, str] = {
    **TORCH_TYPES,
    "U16": "uint16",
    "U32": "uint32",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
"""What the parts of a quantised weight may be stored as, beside those: codes and scales."""

UNIT_ROUNDOFF: Mapping[str, float] = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""Half the gap between 1 and the next number, of the floating dtypes that merge."""

LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127
"""The largest number in float32; torch multiplies by no larger one."""

TORCH_CODES: Mapping[str, str] = {f"torch.{name}": code for code, name in TORCH_TYPES.items()}
"""What torch prints for a dtype → its code: ``"torch.bfloat16"`` → ``"BF16"``."""

DTYPE_CODES: Mapping[str, str] = {name: code for code, name in TORCH_NAMES.items()}
"""The inverse of `TORCH_NAMES`: ``"bfloat16"`` → ``"BF16"``."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A stored tensor, as a row of a safetensors header describes it; as a *slot*, the place of an output tensor."""

    name: str
    """As stored, for example ``model.layers.0.self_attn.q_proj.weight``."""

    dtype: str
    """A safetensors code, a key of `DTYPE_BITS`."""

    shape: tuple[int, ...]

    file: str
    """For a source, the text that names the file: a path, or another storage's name; for a slot, its name in the output."""

    start: int
    """Offset of the first byte, in bytes from the start of the *file* (not of its data section)."""

    nbytes: int

    @property
    def end(self) -> int:
        """Offset just past the last byte, in bytes from the start of the file."""
        return self.start + self.nbytes

    def entry(self, index: int) -> TensorRef:
        """Return one entry of the first axis: an expert of a stack, for example. It is one run of bytes."""
        return self.rows(index, index + 1, self.shape[1:])

    def rows(self, first: int, last: int, shape: tuple[int, ...]) -> TensorRef:
        """Return entries ``first`` to ``last`` of the first axis, as a tensor of the shape given."""
        # Tensors are stored row by row, so each entry of the first axis is one run of bytes, all of one length.
        nbytes = self.nbytes // self.shape[0]
        label = str(first) if last == first + 1 else f"{first}:{last}"
        return replace(
            self,
            name=f"{self.name}[{label}]",
            shape=shape,
            start=self.start + first * nbytes,
            nbytes=(last - first) * nbytes,
        )


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a stored tensor that one module owns, and its orientation."""

    transposed: bool = False
    """True when the weight is stored ``[in, out]``, as transformers' ``Conv1D`` does."""

    box: tuple[tuple[int, int], ...] = ()
    """Its range on each axis of the stored tensor; empty when the tensor is the module's alone."""


@dataclass(frozen=True, slots=True)
class Survival:
    """How much of a delta the storage kept, measured on a sample of rows."""

    weight_norm: float
    """‖W‖ before the merge."""

    delta_norm: float
    """‖Δ‖ as it was wanted, in float32."""

    error_norm: float
    """‖Δ′ - Δ‖ with Δ′ the difference that is really stored."""

    unchanged: float
    """Share of the elements with a delta that the merge left as they were, because it was too small."""

    kept: float = 1.0
    """⟨Δ′, Δ⟩ / ‖Δ‖²: the share of the delta that arrived; 1 where there is none."""

    saturated: float = 0.0
    """Share of the elements outside the grid of the storage."""

    effect_norm: float = -1.0
    """‖ΔQᵀ‖ with Q an orthonormal basis of what the adapters see of their inputs (their A), over all rows; -1 where it was not
    asked for.
    """

    effect_error: float = -1.0
    """‖(Δ′ - Δ)Qᵀ‖, likewise."""

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖W‖; 0 where W is zero."""
        return self.delta_norm / self.weight_norm if self.weight_norm else 0.0

    @property
    def lost(self) -> float:
        """‖Δ′ - Δ‖ / ‖Δ‖: 0 when all of the delta was kept, 1 when none was."""
        return self.error_norm / self.delta_norm if self.delta_norm else 0.0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """The evidence that writing one tensor leaves behind; verification compares it with the disk."""

    name: str
    file: str
    """Name of the file inside the output directory."""

    nbytes: int
    digest: str
    """``xxh3_128:…`` of the tensor's bytes: of the source for a copy, of what was written for a merge."""

    finite: bool
    """False when a merged value is NaN or infinite in the stored dtype."""

    survival: Survival | None = None
    """For a merged tensor."""

    source: Mapping[str, str] = field(default_factory=dict)
    """For a merged tensor, the digests of the stored ones that its weight was made of, by role, as they were read; empty
    for a copy, where `digest` is that."""

    suspects: tuple[tuple[int, int], ...] | None = None
    """Row ranges of a merged tensor whose projections are off by more than rounding explains, so that verification has to
    look at them; None where there are no projections."""

    blocks: tuple[tuple[int, int, str], ...] = ()
    """Some of what was written: offset in the tensor, bytes, digest; verification reads it back."""


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a dense tensor, in whole bytes.

    Example:
        >>> nbytes_of("BF16", (4, 3))
        24
    """
    # Values of four and six bits are packed, so the last byte may be partly used.
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a shape the way messages print it.

    Example:
        >>> shape_text((1920, 12))
        '(1920, 12)'
    """
    return f"({', '.join(map(str, shape))})"
