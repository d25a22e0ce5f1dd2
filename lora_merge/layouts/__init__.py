"""Layouts: where a parameter that an adapter names is stored. One file per rule; `LAYOUTS` is the table.

An adapter has the names of the transformers release that it was trained with; a checkpoint has those that it was published
with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_merge.layouts.apart import apart
from lora_merge.layouts.converted import converted
from lora_merge.layouts.identity import identity
from lora_merge.layouts.renamed import renamed
from lora_merge.layouts.stored import LayoutError, Located, Place, Shape, Stored
from lora_merge.layouts.suffix import suffix


@dataclass(frozen=True, slots=True)
class Layout:
    """One rule by which a parameter is found."""

    find: Callable[[str, Shape | None, Stored], Located | None]
    """Parameter, the adapter's shape of it if known, the checkpoint → its places, or None; raises `LayoutError`."""

    says: str
    """What it says of a parameter that it found; ``plan --explain`` prints it."""


LAYOUTS: Mapping[str, Layout] = {
    "identity": Layout(identity, "it is stored under its own name"),
    "renamed": Layout(renamed, "it is stored under another name; transformers' renaming rules match the two"),
    "converted": Layout(
        converted, "transformers stores it in another form; its parts were mapped to the stored ones"
    ),
    "apart": Layout(apart, "its experts are stored separately in one of the two, and stacked in the other"),
    "suffix": Layout(
        suffix, "transformers has no class for the model; only one tensor's path ends with this name"
    ),
}
"""In the order in which they are asked."""

__all__ = ["LAYOUTS", "Layout", "LayoutError", "Located", "Place", "Shape", "Stored", "locate"]


def locate(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return where a parameter is stored, by the first layout that knows; None when none does.

    Args:
        parameter: as the adapter names it.
        shape: of the adapter's weight ``[out, in]``; None where only the model knows it.
        stored: the checkpoint.

    Raises:
        LayoutError: it has several places, or is stored in a form that cannot be split.
    """
    # A generator: a later layout may need the model's conversion, which takes seconds to build.
    found = (layout.find(parameter, shape, stored) for layout in LAYOUTS.values())
    return next((located for located in found if located is not None), None)
