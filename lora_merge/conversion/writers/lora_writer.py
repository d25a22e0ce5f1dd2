"""What every writer of adapters is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.lora import Lora, Made
    from lora_merge.storage.folder import Folder

LoadFactors = Callable[["Made"], "tuple[torch.Tensor, torch.Tensor]"]
"""A module → A ``[…, r, in]`` and B ``[…, out, r]``, in the dtype that they are stored in, padded where they are to be."""

LoraWriter = Callable[["Folder", "Lora", LoadFactors], "tuple[str, ...]"]
"""Directory, LoRA, factors → the names of the files written; raises ``WriteError``, and ``PlanError`` for what the
format cannot hold."""
