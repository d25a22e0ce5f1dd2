"""Types of the fields of a ``config.json`` that are read here, checked at every level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.errors import CheckpointError
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping

_FIELDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "model_type": ((str,), "a string"),
    "architectures": ((list,), "a list of class names"),
    "tie_word_embeddings": ((bool, int), "true or false"),
    "vocab_size": ((int,), "a whole number"),
}
"""Field → its types as JSON has them, and what a message calls them. A null counts as no field."""


def check_config(config: Mapping[str, Any], label: str) -> None:
    """Check the fields of a model's configuration that are read here; all others are the model's own affair.

    Args:
        config: as parsed.
        label: what to call its file.

    Raises:
        CheckpointError: one holds a value of another type.
    """
    for path, level in config_levels(config):
        for field, (types, wanted) in _FIELDS.items():
            value = level.get(field)
            # The type of a list says nothing of its items, which are looked up as names later.
            items = value if field == "architectures" and isinstance(value, list) else []
            is_sound = value is None or isinstance(value, types)
            if not is_sound or not all(isinstance(item, str) for item in items):
                subject = f"{path}.{field}" if path else field
                # The path is made of untrusted keys, which may be of any length.
                raise CheckpointError(label, subject[:200], f"is {quoted(value)}", wanted)
