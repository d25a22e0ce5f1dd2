"""What a layout is given and what it returns: a checkpoint's tensors, and the places of one parameter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.modeling.pieces import Box
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.weight import Weight
    from lora_merge.modeling.conversion import Conversion, Memory

Shape = tuple[int, ...]


class LayoutError(ValueError):
    """A parameter has no single place. Says why, and names the places that it could have."""

    def __init__(self, sentence: str, candidates: tuple[str, ...] = (), hint: str = "") -> None:
        listed = listing(candidates)
        super().__init__(f"{sentence}: {listed}" if candidates else sentence)
        self.sentence, self.candidates, self.hint = str(self), candidates, hint


@dataclass(frozen=True, slots=True)
class Place:
    """A part of an adapter's weight, and the part of a stored tensor that it belongs to."""

    tensor: str
    """Stored name."""

    at: Box = ()
    """The part of the stored tensor, a range per axis; empty for all of it."""

    part: Box = ()
    """The part of the adapter's weight, a range per axis; empty for all of it."""

    transposed: bool = False
    """True where one of the two is the transpose of the other."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a parameter that an adapter names is stored."""

    rule: str
    """Name of the layout that found it, a key of `LAYOUTS`, or ``"tied"``."""

    places: tuple[Place, ...]

    shape: Shape | None = None
    """Shape of the weight that `Place.part` is a part of, where it is known."""

    by_boxes: bool = False
    """True where the places give the orientation of the stored tensors; otherwise the adapter's shapes decide."""

    @property
    def whole(self) -> str | None:
        """Name of the stored tensor that is exactly the parameter; None for a part of one, or for several."""
        place = self.places[0]
        return place.tensor if len(self.places) == 1 and not (place.at or place.part) else None


class Stored:
    """A checkpoint's tensors, and how transformers reads them.

    Args:
        tensors: its parameters, by stored name.
        conversion: of the model; building it takes seconds, so it is asked only where names do not settle it.
    """

    def __init__(self, tensors: Mapping[str, Weight], conversion: Callable[[], Conversion | None]) -> None:
        self.tensors = tensors
        self._build = conversion

    @cached_property
    def conversion(self) -> Conversion | None:
        """How transformers reads the model; None where it has no class for it."""
        return self._build()

    @cached_property
    def memory(self) -> Memory | None:
        """The tensors as the model's parameters; None where transformers has no class for it."""
        shapes = {name: ref.shape for name, ref in self.tensors.items()}
        return None if self.conversion is None else self.conversion.memory(shapes)

    @cached_property
    def by_spelling(self) -> Mapping[str, tuple[str, ...]]:
        """What transformers' renamings make of each stored name → the stored names; empty without a class."""
        found: dict[str, tuple[str, ...]] = {}
        if self.conversion is not None:
            for name in self.tensors:
                spelling = self.conversion.renamed(name)
                found[spelling] = (*found.get(spelling, ()), name)
        return found

    @cached_property
    def by_ending(self) -> Mapping[str, tuple[str, ...]]:
        """`ending` → the stored names that have it, so that `suffix` looks at few of them."""
        found: dict[str, list[str]] = {}
        for name in self.tensors:
            found.setdefault(ending(name), []).append(name)
        return {last: tuple(names) for last, names in found.items()}

    def module(self, module: str) -> str:
        """Return a module's path in the model, whichever release's spelling is given."""
        if self.conversion is None:
            return module
        return self.conversion.canonical(f"{module}.weight")[0].removesuffix(".weight")

    def canonical(self, name: str) -> str:
        """Return the parameter of the model that a stored tensor belongs to; its own name without a class."""
        return name if self.conversion is None else self.conversion.canonical(name)[0]

    def as_published(self, name: str) -> str:
        """Return a name as a published checkpoint would spell it; unchanged where it is only a part of a parameter."""
        if self.conversion is None:
            return name
        canonical, pattern = self.conversion.canonical(name)
        return name if pattern is not None else self.conversion.spelled(canonical)

    def disk_name(self, parameter: str) -> str:
        """Return the name under which a parameter is stored whole, or would be if the checkpoint had it."""
        if parameter in self.tensors or self.conversion is None:
            return parameter
        names = self.by_spelling.get(self.conversion.renamed(parameter), ())
        if len(names) == 1:
            return names[0]
        canonical, pattern = self.conversion.canonical(parameter)
        if pattern is not None:
            return parameter
        # The renamings change some stored name, so this checkpoint has published names; a new one has to match them.
        as_published = any(name not in self.by_spelling for name in self.tensors)
        return self.conversion.spelled(canonical) if as_published else canonical


def ending(name: str) -> str:
    """Return the last two parts of a path.

    Example:
        >>> ending("model.layers.0.self_attn.q_proj.weight")
        'q_proj.weight'
    """
    return ".".join(name.rsplit(".", 2)[-2:])
