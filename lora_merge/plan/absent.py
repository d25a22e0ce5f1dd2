"""What a configuration names and the adapter has no tensors for: is it the base that lacks it?

PEFT skips an entry that matches no module of the base, without a word. So the usual list of seven projections is a
right one for a family that lacks some of them.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES
from lora_merge.core.family_targets import is_rewritten
from lora_merge.core.report import Issue, note, warning
from lora_merge.core.targets import is_listed, matching_patterns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lora_merge.core.loose_ends import LooseEnd
    from lora_merge.plan.model import Model
    from lora_merge.plan.names import Names

_OF_PARAMETERS = frozenset({"target_parameters", "rank_pattern", "alpha_pattern"})
"""Fields whose entries may mean parameters."""


class Absent:
    """Looks up in a base what an adapter's configuration names.

    Args:
        model: the base.
        names: how the adapter's names and the base's answer to each other.
    """

    def __init__(self, model: Model, names: Names) -> None:
        self._model, self._names = model, names

    def issues(self, ends: Iterable[LooseEnd]) -> list[Issue]:
        """Return an error for each entry that the base has something for, and one note for the others of a field."""
        found: list[Issue] = []
        lacking: dict[str, list[str]] = {}
        for end in ends:
            has = self._has(end)
            if has == "nothing":
                lacking.setdefault(end.field, []).append(end.entry)
            elif has == "experts":
                found.append(_untouched_experts(end))
            else:
                found.append(end.issue())
        return found + [_skipped(field, entries) for field, entries in lacking.items()]

    def _has(self, end: LooseEnd) -> str:
        """Return ``"module"``, ``"experts"`` or ``"nothing"``: what the base has for an entry.

        ``"experts"`` are modules on disk that transformers makes one parameter of, which PEFT skips.
        """
        is_meant = _meaning(end)
        if self._model.skeleton is None and end.entry in INPUT_NAMES | OUTPUT_NAMES:
            return "module"  # one that is tied is not stored
        if self._in_model(is_meant, end):
            return "module"
        stored = self._modules if end.field != "target_parameters" else {}
        stored = stored | (self._parameters if end.field in _OF_PARAMETERS else {})
        matching = [name for path, name in stored.items() if is_meant(path)]
        if self._model.skeleton is None:
            return "module" if matching else "nothing"
        taken = self._names.taken
        loaded = [name for name in matching if name not in taken and self._model.knows(name)]
        if not loaded:
            return "nothing"
        conversion = self._model.stored.conversion
        assert conversion is not None
        in_parts = all(conversion.canonical(name)[1] is not None for name in loaded)
        is_skipped = in_parts and end.field == "target_modules" and not is_rewritten(self._family)
        return "experts" if is_skipped else "module"

    def _in_model(self, is_meant: Callable[[str], bool], end: LooseEnd) -> bool:
        """Return True when a module or parameter of transformers' model is meant, by its own name or by the adapter's."""
        known = self._model.skeleton
        if known is None:
            return False
        parameters = (f"{path}.{name}" for path, own in known.parameters.items() for name in own)
        if end.field in _OF_PARAMETERS and any(map(is_meant, parameters)):
            return True
        if end.field == "target_parameters":
            return False
        return any(map(is_meant, known.classes)) or self._model.module(end.entry) in known.classes

    @property
    def _family(self) -> str:
        return str(self._model.config.get("model_type"))

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Return every module of the checkpoint as the adapter would call it, and a stored tensor of it."""
        found: dict[str, str] = {}
        for name in self._model.sources:
            path = self._names.in_adapter(name.rpartition(".")[0])
            while path and path not in found:
                found[path] = name
                path = path.rpartition(".")[0]
        return found

    @cached_property
    def _parameters(self) -> dict[str, str]:
        """Return every parameter of the checkpoint as the adapter would call it, and its stored name."""
        split = ((name, *name.rpartition(".")[::2]) for name in self._model.sources)
        return {f"{self._names.in_adapter(owner)}.{last}": name for name, owner, last in split}


def _meaning(end: LooseEnd) -> Callable[[str], bool]:
    """Return what tells whether a path is meant by an entry."""
    if end.field == "modules_to_save":
        return lambda path: path.endswith(end.entry)
    if end.field in {"rank_pattern", "alpha_pattern"}:
        return lambda path: bool(matching_patterns({end.entry: 0}, path, end.field))
    return lambda path: is_listed(path, (end.entry,))


def _skipped(field: str, entries: list[str]) -> Issue:
    """Return what there is to say of entries that the base has nothing for; PEFT itself warns of patterns."""
    listed = ", ".join(map(repr, sorted(entries)))
    noun = "parameter" if field == "target_parameters" else "module"
    sentence = (
        f"the base has no {noun} called {listed}, so nothing was trained there: PEFT skips such entries"
    )
    if field in {"rank_pattern", "alpha_pattern"}:
        sentence = f"{listed} matches no module of the base, and PEFT ignores it"
        return warning("unmatched-pattern", field, sentence)
    return note("unmatched-target", field, sentence)


def _untouched_experts(end: LooseEnd) -> Issue:
    """Return the warning of experts that PEFT adapts with transformers 4 and skips with transformers 5."""
    sentence = (
        f"{end.entry!r} names experts, and the adapter has no tensors for them: with transformers 5 they are one "
        "parameter, which PEFT skips; with transformers 4 PEFT would have trained them"
    )
    hint = "if the adapter was trained with transformers 4, its file is incomplete"
    return warning("unmatched-target", end.field, sentence, hint)
