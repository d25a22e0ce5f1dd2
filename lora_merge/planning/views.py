"""Adapters that were trained on a part of the base: the language model of a multimodal checkpoint, or one of its towers.

``AutoModelForCausalLM`` makes a language model of some multimodal checkpoints, with other names than these have. An adapter
of it still fits the checkpoint; the rest is copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, note
from lora_merge.layouts import LayoutError, Located
from lora_merge.modeling.skeleton import language_model_config, parts_of_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lora_merge.layouts import Shape
    from lora_merge.planning.model import Model


def view_for(
    wanted: Mapping[str, Shape | None], model: Model, *, parts: bool = True
) -> tuple[Model, list[Issue]]:
    """Return the base as an adapter knows it: whole, as a language model, or as one of the models inside it.

    Args:
        wanted: the parameters that the adapter names, and the shapes of its weights where they are known.
        model: the base.
        parts: whether the models inside it count; PEFT's own layers need a model with its own config.
    """
    # The quick answer first: only what is left needs transformers.
    if not wanted or all(name in model.sources for name in wanted) or all(_places(wanted, model).values()):
        return model, []
    found = {name: view for name, view in _views(model) if (parts or not view.part) and _fits(wanted, view)}
    places = {name: frozenset(_tensors(_places(wanted, view))) for name, view in found.items()}
    if not found:
        return model, []
    # Two towers of one size: the names fit both.
    if len(set(places.values())) > 1:
        sentence = (
            f"matches several modules ({' or '.join(sorted(found))}), and their sizes do not tell them apart"
        )
        hint = "rename the adapter's tensors to match the base's names"
        return model, [error("no-one-place", next(iter(wanted)), sentence, hint)]
    # Several views may lead to the same tensors; the one whose own names these are is named in the note.
    own = [view.part for view in found.values() if _has_all(view.part, wanted, model)]
    name, view = next((one for one in found.items() if one[1].part in own), next(iter(found.items())))
    sentence = f"the adapter was trained on a part of the base ({name}); the rest is copied"
    return view, [note("part", next(iter(wanted)), sentence)]


def _has_all(part: str, wanted: Mapping[str, Shape | None], model: Model) -> bool:
    """Return True when a model inside a base has every parameter under its own name."""
    return bool(part) and all(_is_own(f"{part}.{name}", model) for name in wanted)


def _is_own(name: str, model: Model) -> bool:
    """Return True for a parameter of transformers' model, under the model's own name."""
    conversion = model.stored.conversion
    return conversion is not None and conversion.shape(name) is not None


def _views(model: Model) -> Iterator[tuple[str, Model]]:
    """Yield the models that a base may be taken for, each with the name that a message gives it."""
    config = language_model_config(model.config)
    if config is not None:
        yield str(config["architectures"][0]), replace(model, config=config)
    for part in parts_of_model(model.config):
        yield part, replace(model, part=part)


def _places(wanted: Mapping[str, Shape | None], model: Model) -> dict[str, Located | None]:
    """Return parameter → where it is stored; None for no place, or for several."""
    found: dict[str, Located | None] = {}
    for name, shape in wanted.items():
        try:
            found[name] = model.locate(name, shape)
        except LayoutError:
            found[name] = None
    return found


def _fits(wanted: Mapping[str, Shape | None], model: Model) -> bool:
    """Return True when a model has every parameter, in its size."""
    # Sizes are compared sorted, since a weight may be stored transposed.
    for name, found in _places(wanted, model).items():
        shape = wanted[name]
        if found is None or (
            shape is not None and found.shape is not None and sorted(shape) != sorted(found.shape)
        ):
            return False
    return True


def _tensors(places: Mapping[str, Located | None]) -> Iterator[tuple[str, str]]:
    """Yield ``(parameter, stored tensor)`` for each tensor that holds some of a parameter."""
    for name, found in places.items():
        for place in found.places if found is not None else ():
            yield name, place.tensor
