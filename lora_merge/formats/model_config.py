"""A model's ``config.json``, read and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.modeling.config_fields import check_config
from lora_merge.storage.small_files import read_json

if TYPE_CHECKING:
    from pathlib import Path


def read_config(path: str | Path) -> dict[str, Any]:
    """Return the table of a model's ``config.json``.

    Raises:
        CheckpointError: it cannot be read, is not a JSON table, or a field that is used here has another type.
    """
    config = read_json(path)
    check_config(config, str(path))
    return config
