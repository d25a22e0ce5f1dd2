"""The types that every writer of adapters shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lora_merge.conversion.lora import Lora, Made
    from lora_merge.storage.folder import Folder

LoadFactors = Callable[["Made"], "tuple[torch.Tensor, torch.Tensor]"]
"""A module → A ``[…, r, in]`` and B ``[…, out, r]``, as they are stored: dtype and padding included."""

LoraWriter = Callable[["Folder", "Lora", LoadFactors], "tuple[str, ...]"]
"""Directory, LoRA, factors → the names of the written files. Raises ``WriteError``, and ``ConvertError`` for a module
that the format cannot hold."""
