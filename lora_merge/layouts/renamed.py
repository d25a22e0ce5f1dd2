"""A parameter that is stored under another spelling of its name: that of another transformers release, for example."""

from __future__ import annotations

from lora_merge.layouts.stored import LayoutError, Located, Place, Shape, Stored


def renamed(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return the tensor whose name transformers' renamings turn into the same name as the parameter's.

    Raises:
        LayoutError: there are several.
    """
    del shape
    if stored.conversion is None:
        return None
    # Both names are renamed: either of them, or both, may be of an older release.
    names = stored.by_spelling.get(stored.conversion.renamed(parameter), ())
    if len(names) > 1:
        raise LayoutError(f"{parameter} matches {len(names)} tensors of the base", names)
    if not names:
        return None
    return Located("renamed", (Place(names[0]),), stored.tensors[names[0]].shape)
