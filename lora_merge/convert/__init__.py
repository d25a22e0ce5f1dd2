"""Adapter → the adapter to be written: which modules it has, what their factors are made of, what its config says."""

from __future__ import annotations

from lora_merge.convert.config import adapter_config, listed, scaling
from lora_merge.convert.joined import Joined
from lora_merge.convert.making import Maker
from lora_merge.convert.modules import Draft, draft, needs_base

__all__ = ["Draft", "Joined", "Maker", "adapter_config", "draft", "listed", "needs_base", "scaling"]
