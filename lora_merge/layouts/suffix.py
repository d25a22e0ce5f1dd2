"""A parameter of a model that transformers has no class for, stored under a longer or a shorter path."""

from __future__ import annotations

from lora_merge.layouts.stored import LayoutError, Located, Place, Shape, Stored, ending


def suffix(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return the one tensor whose name ends as the parameter's does and whose shape fits.

    Raises:
        LayoutError: there are several.
    """
    if stored.conversion is not None:
        return None
    # An ending alone may fit by chance, so the shape has to fit too; sorted, since the weight may be stored
    # transposed.
    names = tuple(
        name
        for name in stored.by_ending.get(ending(parameter), ())
        for ref in [stored.tensors[name]]
        if (name.endswith(f".{parameter}") or parameter.endswith(f".{name}"))
        and (shape is None or sorted(ref.shape) == sorted(shape))
    )
    if len(names) > 1:
        raise LayoutError(
            f"{parameter} matches {len(names)} tensors of the base, and transformers has no class for the model",
            names,
        )
    if not names:
        return None
    return Located("suffix", (Place(names[0]),), stored.tensors[names[0]].shape)
