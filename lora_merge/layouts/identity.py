"""A parameter that is stored under its own name."""

from __future__ import annotations

from lora_merge.layouts.stored import Located, Place, Shape, Stored


def identity(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return the tensor of the parameter's own name."""
    del shape
    # No conversion of transformers 5.23 keeps a name and changes its meaning, except for stacked experts that are
    # stored transposed. Those tell by their shape, or are refused as square.
    if parameter not in stored.tensors:
        return None
    return Located("identity", (Place(parameter),), stored.tensors[parameter].shape)
