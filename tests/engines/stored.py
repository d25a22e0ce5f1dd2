"""The one list of quantised bases that engines are asked to load once something is merged into them.

Each is what a library that quantises wrote (`tests/fixtures/quantised`), or that with groups as wide as published ones
have, or with the two norms that make a Llama a Qwen3. Everything here is data and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.engines.families import ATTENTION, STACKED, Engine, Unserved

Output = Literal["dense", "mixed"]
OUTPUTS: tuple[Output, ...] = ("dense", "mixed")

WEIGHTS_ROUNDED = 2e-2
"""How far a log-probability may be off where merged weights are stored in bfloat16, and all is computed in float32."""

ALL_ROUNDED = 4e-2
"""The same where what is computed is rounded to bfloat16 too, layer by layer."""

INPUTS_IN_FP8 = 2e-1
"""The same where the engine also rounds what it multiplies to FP8, token by token, as the storage asks it to."""

SOME = ("q_proj", "down_proj")
"""In a mixed output these are dense, and so are k and v, which engines load together with q. The rest stays."""

NO_STORAGE = "does not know the storage"


@dataclass(frozen=True, slots=True)
class Stored:
    """A quantised base, and an adapter for it."""

    name: str
    """What a user calls the storage, and the family."""

    fixture: str
    """The folder that it is made from."""

    adapter: str = "LoRA on some layers"
    lora: Mapping[str, Any] = field(default_factory=lambda: {"target_modules": list(SOME)}, hash=False)
    """What ``LoraConfig`` is told, beside rank and alpha."""

    outputs: tuple[Output, ...] = OUTPUTS
    has_wide_groups: bool = False
    """Every second group of 64 goes: what is left has groups of 128, the only ones that LMDeploy takes."""

    is_qwen3: bool = False
    """The Llama gets the norms of a Qwen3: LMDeploy's PyTorch engine reads exceptions in some families only."""

    mixed_tolerance: float = ALL_ROUNDED
    """Of the mixed output in vLLM, which computes it in bfloat16."""

    unserved: Mapping[Engine, Unserved] = field(default_factory=dict, hash=False)
    """Engines that do not take the mixed output. All of them take the dense one."""

    otherwise: Mapping[Engine, str] = field(default_factory=dict, hash=False)
    """Engines that load the mixed output without an error and compute something else, and why."""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.adapter}"

    def tolerance(self, output: Output, engine: Engine) -> float:
        """Return how far an engine's log-probabilities may be off."""
        return self.mixed_tolerance if (output, engine) == ("mixed", "vllm") else WEIGHTS_ROUNDED


def _unknown(**says: str) -> dict[Any, Unserved]:
    return {engine: Unserved(text, NO_STORAGE) for engine, text in says.items()}


GPT_OSS = "MXFP4 experts, gpt-oss"
NO_PACKED = "Only compressed-tensors `pack-quantized` format is supported"

FP8_LLAMA = Stored(
    "FP8 in blocks, Llama",
    "fp8-block",
    otherwise={
        "lmdeploy": "loads it, and rounds the dense weights to FP8: it reads no exceptions in this family"
    },
)

STORED: tuple[Stored, ...] = (
    FP8_LLAMA,
    Stored("FP8 in blocks, Qwen3", "fp8-block", is_qwen3=True),
    Stored(
        "compressed-tensors INT4, Llama",
        "ct-int4",
        unserved={
            "lmdeploy": Unserved(
                "Unsupported compressed-tensors `group_size`: expected 32, got 128", "takes groups of 32 only"
            )
        },
    ),
    Stored(
        "compressed-tensors FP8 by channel, Llama",
        "ct-fp8-channel",
        mixed_tolerance=INPUTS_IN_FP8,
        unserved=_unknown(lmdeploy=NO_PACKED, turbomind="only supports pack-quantized format"),
    ),
    Stored(
        "GPTQ, Qwen2",
        "gptq-4bit",
        has_wide_groups=True,
        unserved=_unknown(lmdeploy="Unsupported quant method: gptq"),
    ),
    Stored("AWQ, Qwen3", "awq-gemm", has_wide_groups=True, is_qwen3=True),
    Stored(
        GPT_OSS,
        "gptoss-mxfp4",
        adapter="LoRA on attention",
        lora={"target_modules": ["q_proj", "o_proj"]},
        unserved=_unknown(lmdeploy="Unsupported quant method: mxfp4"),
    ),
    Stored(
        GPT_OSS,
        "gptoss-mxfp4",
        adapter="LoRA on experts too",
        lora={"target_modules": list(ATTENTION), "target_parameters": list(STACKED)},
        outputs=("dense",),
    ),
)

ROWS: tuple[tuple[Stored, Output], ...] = tuple(
    (about, output) for about in STORED for output in about.outputs
)
"""What engines are asked about, one by one."""
