"""The one list of outputs with new codes that engines are asked to load: on a quantised base's own scales, and quantised by
``--quantize``.

Everything here is data and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tests.engines.families import Engine, Unserved
from tests.engines.stored import GPT_OSS, NO_PACKED, NO_STORAGE, Stored

Rounding = Literal["nearest", "adapter"]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far log-probabilities may be off."""

    largest: float
    mean: float


IN_BFLOAT16 = Tolerance(6e-2, 1e-2)
"""Where all is computed in bfloat16.

Numbers are rounded about a dozen times, by at most 2⁻⁹ of their size, and log-probabilities of random tokens are up to 9 in
size: √12 · 2⁻⁹ · 9.
"""

CLOSE_CALLS = Tolerance(3e-1, 4e-2)
"""The same where a router chooses experts: where two are as good, rounding chooses."""

INPUTS_IN_FP8 = Tolerance(4e-1, 9e-2)
"""Where the engine also rounds what it multiplies to FP8, of 4 bits, token by token."""

INPUTS_IN_INT8 = Tolerance(2e-1, 4e-2)
"""The same in INT8."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A base, and what is made of it with an adapter that has learned something."""

    title: str

    base: Stored | None = None
    """One that is quantised, whose scales stay; None for a dense Llama in bfloat16, which is quantised."""

    scheme: str = ""
    """Of ``--quantize``."""

    tolerance: Tolerance = IN_BFLOAT16
    """Of vLLM."""

    unserved: Mapping[Engine, Unserved] = field(default_factory=dict, hash=False)
    """Engines that do not take it."""

    is_always_asked: bool = False
    """False for what is only asked when the table is written: each takes some ten seconds."""

    @property
    def roundings(self) -> tuple[Rounding, ...]:
        return ("nearest", "adapter") if self.base else ("nearest",)


def _unknown(**says: str) -> dict[Engine, Unserved]:
    return {engine: Unserved(text, NO_STORAGE) for engine, text in says.items()}  # type: ignore[misc]


NO_FORMAT = "only supports pack-quantized format"
WIDE = Unserved(
    "Unsupported compressed-tensors `group_size`: expected 32, got 128", "takes groups of 32 only"
)
COMPRESSED = _unknown(lmdeploy=NO_PACKED, turbomind=NO_FORMAT)

CODED: tuple[Coded, ...] = (
    Coded(
        "FP8 in blocks, Llama",
        Stored("", "fp8-block"),
        unserved={
            "turbomind": Unserved(
                "shape '[-1, 0, 2, 2]' is invalid", "as its base: heads smaller than a block"
            )
        },
        is_always_asked=True,
    ),
    Coded(
        "compressed-tensors FP8 by channel, Llama",
        Stored("", "ct-fp8-channel"),
        tolerance=INPUTS_IN_FP8,
        unserved=COMPRESSED,
    ),
    Coded(
        "compressed-tensors INT4, Llama",
        Stored("", "ct-int4"),
        unserved={"lmdeploy": WIDE},
        is_always_asked=True,
    ),
    Coded("compressed-tensors NVFP4, Llama", Stored("", "ct-nvfp4"), unserved=COMPRESSED),
    Coded(
        "GPTQ, Qwen2",
        Stored("", "gptq-4bit", has_wide_groups=True),
        unserved=_unknown(lmdeploy="Unsupported quant method: gptq"),
    ),
    Coded(
        "AWQ, Qwen3",
        Stored("", "awq-gemm", has_wide_groups=True, is_qwen3=True),
        unserved={"lmdeploy": Unserved("AssertionError", "as its base: does not take so small a model")},
    ),
    Coded(
        GPT_OSS,
        Stored("", "gptoss-mxfp4"),
        tolerance=CLOSE_CALLS,
        unserved=_unknown(lmdeploy="Unsupported quant method: mxfp4"),
    ),
    Coded("Llama, --quantize fp8", scheme="fp8", is_always_asked=True),
    Coded(
        "Llama, --quantize fp8-channel", scheme="fp8-channel", tolerance=INPUTS_IN_FP8, unserved=COMPRESSED
    ),
    Coded("Llama, --quantize int8", scheme="int8", tolerance=INPUTS_IN_INT8, unserved=COMPRESSED),
    Coded("Llama, --quantize int4", scheme="int4", unserved={"lmdeploy": WIDE}, is_always_asked=True),
    Coded("Llama, --quantize int4-asym", scheme="int4-asym", unserved={"lmdeploy": WIDE}),
    Coded("Llama, --quantize mxfp4", scheme="mxfp4", unserved=COMPRESSED),
    Coded("Llama, --quantize nvfp4", scheme="nvfp4", unserved=COMPRESSED, is_always_asked=True),
)

CODED_ROWS: tuple[tuple[Coded, Rounding], ...] = tuple(
    (about, rounding) for about in CODED for rounding in about.roundings
)
"""What engines are asked about, one by one."""
