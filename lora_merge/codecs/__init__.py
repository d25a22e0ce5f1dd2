"""Codecs: stored bytes ↔ float32. One file for each storage; `CODECS` is the table of what can be read, `ENCODERS` of what can
be written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.codecs.awq import Awq
from lora_merge.codecs.bnb4 import Bnb4
from lora_merge.codecs.codec import Codec, Encoder, Naming
from lora_merge.codecs.dense import Dense
from lora_merge.codecs.fp4 import Fp4
from lora_merge.codecs.gptq import Gptq
from lora_merge.codecs.llm_int8 import LlmInt8
from lora_merge.codecs.mlx_affine import MlxAffine
from lora_merge.codecs.modelopt_awq import ModelOptAwq
from lora_merge.codecs.mxfp4_experts import Mxfp4Experts
from lora_merge.codecs.packed_int import PackedInt
from lora_merge.codecs.scaled import Scaled
from lora_merge.core.weight import DENSE, WEIGHT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.weight import Storage

__all__ = ["CODECS", "ENCODERS", "WRITTEN_BY_DEFAULT", "Codec", "Encoder", "names_of"]

ENCODERS: dict[str, Encoder] = {
    DENSE: Dense(),
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
"""What a merge can write."""

CODECS: dict[str, Codec] = {**ENCODERS}
"""What can be read."""

WRITTEN_BY_DEFAULT = {DENSE}
"""Those of `ENCODERS` whose weights stay as they are stored when they change, if nothing is asked for."""


def names_of(name: str, storage: Storage) -> Mapping[str, str]:
    """Return role → name of the stored tensor, for a parameter's name that says nothing about its storage."""
    codec = ENCODERS[storage.codec]
    return codec.names(name, storage) if isinstance(codec, Naming) else {WEIGHT: name}
