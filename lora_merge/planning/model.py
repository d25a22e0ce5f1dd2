"""The base as an adapter meets it: names, classes, and the tie of its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, owner_name
from lora_merge.core.report import Issue, error
from lora_merge.layouts import LayoutError, Located, Place, Shape, Stored, locate
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.skeleton import Skeleton, build_skeleton, may_hold_conv1d, may_share
from lora_merge.planning.outline import Outline
from lora_merge.planning.shared import Shared, shared_weights
from lora_merge.planning.ties import Tie

if TYPE_CHECKING:
    from lora_merge.core.weight import Weight

SAVE_ANEW = (
    "load the base in transformers, save_pretrained(…, save_original_format=False), and merge into that"
)
"""What to do about a layout that cannot be split."""


@dataclass(frozen=True)
class Model:
    """What planning asks about a base. Skeleton and conversion take seconds, and are built when they are needed."""

    outline: Outline
    """The names of the output, and the stored tensors behind them."""

    config: Mapping[str, Any]
    """``config.json``, as the output has it."""

    tie: Tie | None = None
    """The tie of the embeddings, if there is one and an adapter touches it."""

    part: str = ""
    """Path of the module whose own names an adapter has; empty for the model itself."""

    def with_tie(self, tie: Tie) -> Model:
        """Return the model with a tie."""
        tied = replace(self, tie=tie)
        # What was computed (seconds of transformers' time) is taken over: a tie changes none of it.
        given = {field.name for field in fields(self)}
        vars(tied).update({name: value for name, value in vars(self).items() if name not in given})
        return tied

    @property
    def sources(self) -> Mapping[str, Weight]:
        """Name in the output → stored weight."""
        return self.outline.sources

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """The module tree; None where transformers has no class for the model."""
        return build_skeleton(self.config)

    @cached_property
    def may_hold_conv1d(self) -> bool:
        """True when some weights may be stored ``[in, out]``, by the family."""
        return may_hold_conv1d(self.config)

    @cached_property
    def stored(self) -> Stored:
        """The tensors as layouts take them."""
        return Stored(self.sources, lambda: Conversion.of(self.config, self.part))

    def source(self, name: str) -> Weight:
        """Return the stored weight behind a name of the output, which may be an unstored user of a shared weight."""
        if name in self.sources:
            return self.sources[name]
        if self.tie is not None and name in {self.tie.embedding, self.tie.head}:
            return self.sources[self.tie.source]
        return self.sources[self._holders[name]]

    def locate(self, parameter: str, shape: Shape | None) -> Located | None:
        """Return where a parameter of an adapter is stored; None when the base does not have it.

        Raises:
            LayoutError: it has several places, or is stored in a form that cannot be split.
        """
        # The unstored end of a tie has its own place, since the two ends may become two tensors.
        if self.tie is not None and parameter not in self.sources:
            name = self.stored.disk_name(parameter)
            if name in {self.tie.embedding, self.tie.head}:
                return Located("tied", (Place(name),), self.source(name).shape)
        found = locate(parameter, shape, self.stored)
        # So has a user of a shared weight; transformers is asked only where no layout knows the name.
        if found is None and self.stored.conversion is not None:
            name = self.stored.disk_name(parameter)
            if name in self._holders:
                return Located("tied", (Place(name),), self.source(name).shape)
        return found

    @property
    def may_share(self) -> bool:
        """True when weights other than the embeddings may have several users, by the family."""
        return may_share(self.config)

    @cached_property
    def input_embedding(self) -> str:
        """Parameter of the input embedding under its stored name; empty where it is not known."""
        known = self.skeleton
        if known is None or not known.input_embedding:
            return ""
        return self.stored.disk_name(f"{known.input_embedding}.weight")

    @cached_property
    def shared(self) -> tuple[Shared, ...]:
        """Weights that several modules use; empty where transformers has no class for the model."""
        known = self.skeleton
        return shared_weights(known.tied, self.stored) if known is not None and known.tied else ()

    @cached_property
    def _holders(self) -> Mapping[str, str]:
        """Unstored user of a shared weight → stored tensor with its values."""
        return {
            name: shared.holder
            for shared in self.shared
            if shared.holder
            for name in shared.unstored(self.sources)
        }

    def users_with(self, name: str) -> tuple[str, ...]:
        """Return all parameters that share one weight with this one, itself included; empty where it has its own."""
        if self.tie is not None and name in {self.tie.embedding, self.tie.head}:
            return (self.tie.embedding, self.tie.head)
        return next((shared.users for shared in self.shared if name in shared.users), ())

    def copies_of(self, tie: Tie) -> tuple[str, ...]:
        """Return stored tensors that transformers ties to the input embedding, without the output embedding."""
        return tuple(
            name
            for shared in self.shared
            if shared.users[0] == tie.embedding
            for name in shared.users[1:]
            if name in self.sources and name != tie.head
        )

    def is_embedding(self, name: str) -> bool:
        """Return True for a parameter of an input or output embedding."""
        if owner_name(name) in INPUT_NAMES | OUTPUT_NAMES:
            return True
        # transformers is asked where the name does not tell; it takes seconds.
        known = self.skeleton
        if known is None:
            return False
        path, _, parameter = name.rpartition(".")
        path = self.module(path)
        ends = {known.input_embedding, known.output_embedding}
        return path in ends or any(
            source == f"{path}.{parameter}" and end.rpartition(".")[0] in ends
            for end, source in known.tied.items()
        )

    def has(self, name: str) -> bool:
        """Return True for a parameter that is stored, or that transformers' model has without one (by a tie)."""
        known = self.skeleton if name not in self.sources else None
        path, _, parameter = name.rpartition(".")
        return name in self.sources or (
            known is not None and parameter in known.parameters.get(self.module(path), ())
        )

    def knows(self, name: str) -> bool:
        """Return True when transformers' model has a parameter for a stored tensor; layers for MTP have none."""
        conversion = self.stored.conversion
        if conversion is None:
            return False
        parameter = conversion.canonical(name)[0]
        return conversion.shape(parameter) is not None and parameter.startswith(self.part)

    def module(self, module: str) -> str:
        """Return a module's path in transformers' model, in whichever release's spelling it is given."""
        known = self.skeleton
        if known is None or module in known.classes:
            return module
        return self.stored.module(module)


def misplaced(subject: str, exc: LayoutError) -> Issue:
    """Return the issue of a parameter with several possible places, or with none that can be split."""
    hint = "rename the adapter's tensors to match the base's names" if exc.candidates else SAVE_ANEW
    return error("no-one-place", subject, exc.sentence, exc.hint or hint)
