"""Codecs: stored bytes ↔ float32. One file for each storage; `CODECS` is the table of what can be read, `ENCODERS` of what can
be written.
"""

from __future__ import annotations

from lora_merge.codecs.awq import Awq
from lora_merge.codecs.bnb4 import Bnb4
from lora_merge.codecs.codec import Codec, Encoder
from lora_merge.codecs.dense import Dense
from lora_merge.codecs.fp4 import Fp4
from lora_merge.codecs.gptq import Gptq
from lora_merge.codecs.llm_int8 import LlmInt8
from lora_merge.codecs.mlx_affine import MlxAffine
from lora_merge.codecs.modelopt_awq import ModelOptAwq
from lora_merge.codecs.mxfp4_experts import Mxfp4Experts
from lora_merge.codecs.packed_int import PackedInt
from lora_merge.codecs.scaled import Scaled
from lora_merge.core.weight import DENSE

__all__ = ["CODECS", "ENCODERS", "Codec", "Encoder"]

_DENSE = Dense()

CODECS: dict[str, Codec] = {
    DENSE: _DENSE,
    "scaled": Scaled(),
    "fp4": Fp4(),
    "mxfp4_experts": Mxfp4Experts(),
    "llm_int8": LlmInt8(),
    "awq": Awq(),
    "bnb4": Bnb4(),
    "gptq": Gptq(),
    "mlx_affine": MlxAffine(),
    "modelopt_awq": ModelOptAwq(),
    "packed_int": PackedInt(),
}

ENCODERS: dict[str, Encoder] = {DENSE: _DENSE}
"""Those of `CODECS` that a merge can write; weights of the others become dense, or are copied as they are."""
