"""Two spellings of one model: which of an adapter's names is which of the base's."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_merge.core.adapter import StackedPair
    from lora_merge.layouts import Located
    from lora_merge.modeling.pieces import Box
    from lora_merge.planning.model import Model

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Names:
    """What the parameters that were found tell about the names of all others.

    Args:
        model: the base.
        located: where each parameter that the adapter names was found.
    """

    def __init__(self, model: Model, located: Mapping[str, Located]) -> None:
        self._model, self._located = model, located

    @property
    def parameters(self) -> Iterable[str]:
        """The parameters that were found, under the adapter's names."""
        return self._located.keys()

    def has_modules(self, pairs: Iterable[StackedPair]) -> bool:
        """Return True when each of these pairs has a parameter that was found in its module."""
        found = {parameter.rpartition(".")[0] for parameter in self._located}
        return all(pair.module in found for pair in pairs)

    @cached_property
    def taken(self) -> frozenset[str]:
        """Stored tensors that hold something the adapter names."""
        return frozenset(place.tensor for found in self._located.values() for place in found.places)

    @cached_property
    def _rewritings(self) -> dict[str, str]:
        """Beginning of a path on disk → in the adapter: ``"model.layers"`` → ``"model.language_model.layers"``."""
        learnt: dict[str, str] = {}
        for parameter, found in self._located.items():
            if found.whole is not None and found.whole != parameter:
                theirs, ours = _beginnings(found.whole, parameter)
                learnt.setdefault(theirs, ours)
        return learnt

    def in_adapter(self, module: str) -> str:
        """Return what the adapter would call a module of the base."""
        # The longest beginning that is known says most.
        for beginning in _paths(module) if self._rewritings else ():
            if beginning in self._rewritings:
                return self._rewritings[beginning] + module[len(beginning) :]
        if self._speaks_as_published:
            return self._model.stored.as_published(f"{module}.weight").removesuffix(".weight")
        return module

    @cached_property
    def _speaks_as_published(self) -> bool:
        """True when the adapter has the names of published checkpoints, and the base has others."""
        renamed = [parameter for parameter, found in self._located.items() if found.rule == "renamed"]
        return bool(renamed) and all(
            self._model.stored.as_published(parameter) == parameter for parameter in renamed
        )

    @cached_property
    def _kinds(self) -> frozenset[str]:
        return frozenset(_NUMBER.sub("#", parameter) for parameter in self._located)

    def has_siblings(self, module: str) -> bool:
        """Return True when the adapter names the same module of another layer or expert."""
        return _NUMBER.sub("#", f"{module}.weight") in self._kinds

    def several_rewritings(self) -> list[Issue]:
        """Return an issue when names are endings of several parts of the base: an adapter belongs to one."""
        beginnings: dict[str, str] = {}
        for parameter, found in self._located.items():
            if found.rule == "suffix":
                shorter, longer = sorted((found.places[0].tensor, parameter), key=len)
                beginnings.setdefault(longer.removesuffix(shorter), parameter)
        if len(beginnings) < 2:
            return []
        sentence = f"the adapter's names match the endings of several parts of the base: {', '.join(sorted(beginnings))}"
        hint = "rename the adapter's tensors to match the base's names"
        return [error("no-one-place", min(beginnings.values()), sentence, hint)]

    def named_twice(self) -> list[Issue]:
        """Return an issue for each stored tensor, or part of one, for which the adapter has two names."""
        owners: dict[str, dict[Box, str]] = {}
        issues = []
        for parameter, found in self._located.items():
            for place in found.places:
                boxes = owners.setdefault(place.tensor, {})
                other = (
                    # All of a tensor meets any part of it.
                    boxes.get(place.at)
                    or boxes.get(())
                    or (next(iter(boxes.values()), None) if not place.at else None)
                )
                if other is not None:
                    sentence = f"means the base's {place.tensor}, and so does the adapter's {other}"
                    hint = (
                        "keep only the tensors that were trained last: the file mixes the names of two "
                        "releases"
                    )
                    issues.append(error("named-twice", parameter, sentence, hint))
                    break
                boxes[place.at] = parameter
        return issues

    def absent_experts(self) -> list[str]:
        """Return the first expert without a name in the adapter, for each stack with experts that it names."""
        found: dict[str, set[int]] = {}
        for parameter, located in self._located.items():
            at = located.places[0].at
            if not located.by_boxes or len(located.places) != 1 or not _is_one_of_a_stack(at):
                continue
            # The last number in the name is the expert's.
            *_, number = _NUMBER.finditer(parameter)
            kind = f"{parameter[: number.start()]}#{parameter[number.end() :]}"
            found.setdefault(kind, set()).add(int(number[0]))
        absent = []
        stacks: dict[str, str] = {}
        for kind, numbers in found.items():
            # The base's stack says how many experts there are.
            tensor = self._located[kind.replace("#", str(min(numbers)))].places[0].tensor
            stacks[tensor] = kind
            n_experts = self._model.sources[tensor].shape[0]
            first = next((n for n in range(n_experts) if n not in numbers), None)
            if first is not None:
                absent.append(kind.replace("#", str(first)).removesuffix(".weight"))
        return absent + self._untouched_stacks(stacks)

    def _untouched_stacks(self, stacks: Mapping[str, str]) -> list[str]:
        """Return the first expert of each stack in layers where the adapter names none.

        Args:
            stacks: stored tensor → how the adapter names one of its experts, ``#`` for its number.
        """
        kinds = {_NUMBER.sub("#", tensor): (tensor, kind) for tensor, kind in stacks.items()}
        absent = []
        for name in self._model.sources:
            tensor, kind = kinds.get(_NUMBER.sub("#", name), ("", ""))
            if not tensor or name in self.taken or not self._is_loaded(name):
                continue
            # The adapter's name for this layer is that of another layer with the numbers exchanged.
            theirs, ours = _NUMBER.findall(name), iter(_NUMBER.findall(tensor))
            numbers = dict(zip(ours, theirs, strict=True))
            renumbered = _NUMBER.sub(lambda match: numbers.get(match[0], match[0]), kind)  # noqa: B023 - used at once
            absent.append(renumbered.replace("#", "0").removesuffix(".weight"))
        return absent

    def _is_loaded(self, name: str) -> bool:
        """Return False for a stored tensor for which transformers' model has no parameter (MTP)."""
        return self._model.stored.conversion is None or self._model.knows(name)


def _is_one_of_a_stack(at: Box) -> bool:
    """Return True for a box that is in a single matrix of a stack."""
    return len(at) == 3 and at[0][1] - at[0][0] == 1


def _beginnings(one: str, other: str) -> tuple[str, str]:
    """Return two paths, each cut after the first part of the ending that they share."""
    mine, yours = one.split("."), other.split(".")
    n = 0
    while n < min(len(mine), len(yours)) and mine[-1 - n] == yours[-1 - n]:
        n += 1
    return ".".join(mine[: len(mine) - n + 1]), ".".join(yours[: len(yours) - n + 1])


def _paths(path: str) -> list[str]:
    """Return a path and those of its parents, the longest first."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
