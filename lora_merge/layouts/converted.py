"""A parameter that is stored in parts, or as a part: experts one by one or stacked, projections fused or split."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from lora_merge.core.tensor import shape_text
from lora_merge.layouts.stored import LayoutError, Located, Place, Shape, Stored
from lora_merge.modeling.conversion import ConversionError

if TYPE_CHECKING:
    from lora_merge.modeling.pieces import Box, Piece


def converted(parameter: str, shape: Shape | None, stored: Stored) -> Located | None:
    """Return the boxes of stored tensors from which transformers makes the parameter.

    Adapter and checkpoint may each have their own layout: both are laid into the model's, and what meets there
    belongs together.

    Args:
        parameter: as the adapter names it.
        shape: of the adapter's weight; None for the model's own parameter of that name.
        stored: the checkpoint.

    Raises:
        LayoutError: transformers makes it by an operation that is unknown here, or a part of it is not stored.
    """
    conversion, memory = stored.conversion, stored.memory
    if conversion is None or memory is None:
        return None
    target, pattern = conversion.canonical(parameter)
    own = conversion.shape(target)
    if own is None:
        return None
    # Without a converter the name is that of the model's own parameter.
    shape = own if shape is None or pattern is None else shape
    try:
        found = _places(conversion.parts_of(parameter, shape), stored)
    except ConversionError as exc:
        raise LayoutError(f"{target} is stored in another form, and {exc}") from exc
    if not found:
        return None
    n_covered = sum(_volume(place.part) for place in found)
    # A part without a place in the base would be dropped, and nothing would show it.
    if n_covered != prod(shape):
        sentence = (
            f"only {n_covered} of its {prod(shape)} values, {shape_text(shape)}, are stored in the base"
        )
        raise LayoutError(sentence)
    places = (_trimmed(place, shape, stored.tensors[place.tensor].shape) for place in found)
    return Located("converted", tuple(places), shape, by_boxes=True)


def _places(wanted: dict[str, tuple[Piece, ...]], stored: Stored) -> list[Place]:
    """Return where pieces of an adapter's weight overlap pieces of the checkpoint, in the parameters of the model."""
    assert stored.memory is not None
    places = []
    for target, pieces in wanted.items():
        assembly = stored.memory.assembly(target)
        if assembly is None:
            continue
        for one in pieces:
            for other in assembly.pieces:
                # Both boxes are in the axes of the model's parameter. Their overlap is a box of either part.
                part, at = one.part_box(other.box()), other.part_box(one.box())
                if part is not None and at is not None:
                    places.append(Place(other.part, at, part, _across(one, other)))
    return places


def _across(one: Piece, other: Piece) -> bool:
    """Return True when one of two parts has the last two axes that they share in the other order."""
    # An axis of the whole that is one index of a part (an expert) has no counterpart there.
    shared = [
        (mine.axis, yours.axis)
        for mine, yours in zip(one.spans, other.spans, strict=True)
        if mine.axis is not None and yours.axis is not None
    ][-2:]
    return len(shared) == 2 and (shared[0][0] < shared[1][0]) != (shared[0][1] < shared[1][1])


def _trimmed(place: Place, shape: Shape, stored: Shape) -> Place:
    """Return a place whose boxes are empty where they cover everything, as `Place` has it."""
    at, part = (
        () if box == tuple((0, size) for size in whole) else box
        for box, whole in ((place.at, stored), (place.part, shape))
    )
    return replace(place, at=at, part=part)


def _volume(box: Box) -> int:
    return prod(end - start for start, end in box)
