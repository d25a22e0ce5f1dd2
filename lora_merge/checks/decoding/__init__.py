"""Decodes stored weights to float64, by code that shares nothing with the codecs of the merge.

One file for each family of storages, a function for each codec. They are written from the description of the storages, for
clarity: whole rows, float64. `DECODERS` is the table.
"""

from __future__ import annotations

from lora_merge.checks.decoding.across import awq, gptq
from lora_merge.checks.decoding.blockwise import bnb4
from lora_merge.checks.decoding.decoder import Decoder, Levels, StoredRows, integers, products
from lora_merge.checks.decoding.fp4 import fp4, mxfp4_experts
from lora_merge.checks.decoding.packed import affine_slack, mlx_affine, modelopt_awq, packed_int
from lora_merge.checks.decoding.raw import Raw
from lora_merge.checks.decoding.scaled import llm_int8, scaled
from lora_merge.core.weight import DENSE, WEIGHT

__all__ = ["DECODERS", "Decoder", "Levels", "Raw", "StoredRows", "integers"]


def _dense(stored: StoredRows) -> Levels:
    return Levels(stored.share(WEIGHT))


DECODERS: dict[str, Decoder] = {
    DENSE: Decoder(_dense),
    "scaled": Decoder(scaled, slack=products(1)),
    "fp4": Decoder(fp4, slack=products(2)),
    "mxfp4_experts": Decoder(mxfp4_experts, slack=products(1), is_across=True),
    "packed_int": Decoder(packed_int, slack=products(1)),
    "mlx_affine": Decoder(mlx_affine, slack=affine_slack),
    "gptq": Decoder(gptq, slack=products(1), is_across=True),
    "awq": Decoder(awq, slack=products(1), is_across=True),
    "bnb4": Decoder(bnb4, slack=products(1)),
    "llm_int8": Decoder(llm_int8, slack=products(2)),
    "modelopt_awq": Decoder(modelopt_awq, slack=products(2)),
}
"""By codec. A weight of another codec is not recomputed, and a note says so."""
