"""The base as an adapter meets it: names, classes, and the tie of its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES, owner_name
from lora_merge.core.conversion import Conversion
from lora_merge.core.report import Issue, error
from lora_merge.core.skeleton import Skeleton, build_skeleton, may_hold_conv1d
from lora_merge.layouts import LayoutError, Located, Place, Shape, Stored, locate
from lora_merge.plan.outline import Outline
from lora_merge.plan.ties import Tie

if TYPE_CHECKING:
    from lora_merge.core.tensor import TensorRef

SAVE_ANEW = (
    "load the base in transformers, save_pretrained(…, save_original_format=False), and merge into that"
)
"""The way out of a layout that cannot be taken apart."""


@dataclass
class Model:
    """What planning asks about a base. Skeleton and conversion take seconds, and are built when they are needed."""

    outline: Outline
    """The names of the output, and the stored tensors behind them."""

    config: Mapping[str, Any]
    """``config.json``, as the output has it."""

    tie: Tie | None = None
    """Of the embeddings, if there is one and an adapter touches it."""

    @property
    def sources(self) -> Mapping[str, TensorRef]:
        """Return the stored tensors by their names in the output."""
        return self.outline.sources

    @cached_property
    def skeleton(self) -> Skeleton | None:
        """Return the module tree; None where transformers has no class for the model."""
        return build_skeleton(self.config)

    @cached_property
    def may_hold_conv1d(self) -> bool:
        """Return True when some weights may be stored ``[in, out]``."""
        return may_hold_conv1d(self.config)

    @cached_property
    def stored(self) -> Stored:
        """Return the tensors as layouts look at them."""
        return Stored(self.sources, lambda: Conversion.of(self.config))

    def source(self, name: str) -> TensorRef:
        """Return the stored tensor behind a name of the output; an end of a tie has one, stored or not."""
        if name in self.sources or self.tie is None:
            return self.sources[name]
        return self.sources[self.tie.source]

    def locate(self, parameter: str, shape: Shape | None) -> Located | None:
        """Return where a parameter of an adapter lies; None when nowhere.

        Raises:
            LayoutError: it has several places, or is stored in a form that cannot be taken apart.
        """
        if self.tie is not None and parameter not in self.sources:
            name = self.stored.disk_name(parameter)
            if name in {self.tie.embedding, self.tie.head}:
                return Located("tied", (Place(name),), self.source(name).shape)
        return locate(parameter, shape, self.stored)

    def tied_beside(self, tie: Tie) -> dict[str, str]:
        """Return what else transformers ties: the name on disk → that of what it takes its values from."""
        known = self.skeleton
        pairs = known.tied.items() if known is not None else ()
        named = {self.stored.disk_name(one): self.stored.disk_name(other) for one, other in pairs}
        return {one: other for one, other in named.items() if one not in {tie.embedding, tie.head}}

    def is_embedding(self, name: str) -> bool:
        """Return True for a parameter of an input or output embedding; transformers is asked where its name does not tell."""
        if owner_name(name) in INPUT_NAMES | OUTPUT_NAMES:
            return True
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
        """Return True for a parameter that is stored, or that transformers' model has by a tie."""
        known = self.skeleton if name not in self.sources else None
        path, _, parameter = name.rpartition(".")
        return name in self.sources or (
            known is not None and parameter in known.parameters.get(self.module(path), ())
        )

    def shared_with(self, parameter: str) -> str | None:
        """Return the parameter that one is tied to and that is stored, where it is not; None for any other."""
        known = self.skeleton
        if known is None:
            return None
        path, _, end = parameter.rpartition(".")
        other = known.tied.get(parameter) or known.tied.get(f"{self.module(path)}.{end}")
        name = self.stored.disk_name(other) if other else ""
        return name if name in self.sources else None

    def knows(self, name: str) -> bool:
        """Return True when transformers' model takes in a tensor of this name; it leaves some out, as those for MTP."""
        conversion = self.stored.conversion
        return conversion is not None and conversion.shape(conversion.canonical(name)[0]) is not None

    def module(self, module: str) -> str:
        """Return a module's path in transformers' model, whichever spelling of it is given."""
        known = self.skeleton
        if known is None or module in known.classes:
            return module
        return self.stored.module(module)


def misplaced(subject: str, exc: LayoutError) -> Issue:
    """Return the issue of a parameter whose place cannot be told."""
    hint = "rename the adapter's tensors as the base's are named" if exc.candidates else SAVE_ANEW
    return error("no-one-place", subject, exc.sentence, hint)
