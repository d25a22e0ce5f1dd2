"""Codecs: stored bytes ↔ float32. One file for each storage; `CODECS` is the table of what can be read, `ENCODERS` of what can
be written.
"""

from __future__ import annotations

from lora_merge.codecs.codec import Codec, Encoder
from lora_merge.codecs.dense import Dense
from lora_merge.core.weight import DENSE

__all__ = ["CODECS", "ENCODERS", "Codec", "Encoder"]

_DENSE = Dense()

CODECS: dict[str, Codec] = {DENSE: _DENSE}

ENCODERS: dict[str, Encoder] = {DENSE: _DENSE}
"""Those of `CODECS` that a merge can write; weights of the others become dense, or are copied as they are."""
