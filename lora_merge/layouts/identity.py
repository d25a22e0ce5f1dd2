"""A parameter that is stored under its own name."""

from __future__ import annotations

from lora_merge.layouts.stored import Located, Place, Shape, Stored


def identity(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return the tensor of the parameter's own name.

    No conversion of transformers 5.23 keeps a name and changes what it means, but for stacked experts that are stored
    across; those tell by their shape, or are refused as square.
    """
    del shape
    if parameter not in stored.tensors:
        return None
    return Located("identity", (Place(parameter),), stored.tensors[parameter].shape)
