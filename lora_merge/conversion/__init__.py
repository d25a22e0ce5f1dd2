"""Conversion and extraction: an adapter, or a fine-tune, becomes a LoRA that an engine can load."""

from __future__ import annotations

from lora_merge.conversion.config import adapter_config, listed, module_paths, scaling
from lora_merge.conversion.making import Maker
from lora_merge.conversion.modules import MERGE, Draft, draft, needs_base

__all__ = [
    "MERGE",
    "Draft",
    "Maker",
    "adapter_config",
    "draft",
    "listed",
    "module_paths",
    "needs_base",
    "scaling",
]
