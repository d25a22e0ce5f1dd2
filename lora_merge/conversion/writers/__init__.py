"""Writers of adapters: a LoRA → the files of one format. `ADAPTER_WRITERS` is the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.conversion.writers.gguf import check_gguf, check_ready, write_gguf
from lora_merge.conversion.writers.lora_writer import LoadFactors, LoraWriter
from lora_merge.conversion.writers.mlx_adapter import write_mlx
from lora_merge.conversion.writers.peft_adapter import write_peft

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.requests.choices import AdapterFormat

ADAPTER_WRITERS: Mapping[AdapterFormat, LoraWriter] = {
    "peft": write_peft,
    "gguf": write_gguf,
    "mlx": write_mlx,
}

__all__ = [
    "ADAPTER_WRITERS",
    "LoadFactors",
    "LoraWriter",
    "check_gguf",
    "check_ready",
]
