"""Entries of a configuration that the adapter has no tensors for: does the base lack them?

PEFT skips an entry that matches no module of the base, without a message. So the usual list of seven projections is
correct for a family that lacks some of them.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES
from lora_merge.core.report import Issue, note, warning
from lora_merge.peft_rules.family_targets import is_rewritten
from lora_merge.peft_rules.patterns import patterns_of
from lora_merge.peft_rules.targets import listed_among
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from lora_merge.peft_rules.loose_ends import LooseEnd
    from lora_merge.planning.model import Model
    from lora_merge.planning.spellings import Names

_LISTED = 24
"""Entries that a note names; the usual list of projections has seven."""

_OF_PARAMETERS = frozenset({"target_parameters", "rank_pattern", "alpha_pattern"})
"""Fields whose entries may mean parameters."""


class Absent:
    """Looks up in a base what an adapter's configuration names.

    Args:
        model: the base.
        names: which of the adapter's names is which of the base's.
    """

    def __init__(self, model: Model, names: Names) -> None:
        self._model, self._names = model, names

    def issues(self, ends: Iterable[LooseEnd]) -> list[Issue]:
        """Return an error for each entry that the base has something for, and one note for the other entries of a
        field.
        """
        found: list[Issue] = []
        lacking: dict[str, list[str]] = {}
        by_field: dict[str, list[LooseEnd]] = {}
        for end in ends:
            by_field.setdefault(end.field, []).append(end)
        for field, own in by_field.items():
            meant = _Meant(field, [end.entry for end in own])
            in_model, stored = self._in_model(meant), self._stored(meant)
            for end in own:
                has = self._has(end, in_model, stored.get(end.entry, []))
                if has == "nothing":
                    lacking.setdefault(field, []).append(end.entry)
                elif has == "experts":
                    found.append(_untouched_experts(end))
                else:
                    found.append(end.issue())
        return found + [_skipped(field, entries) for field, entries in lacking.items()]

    def _has(self, end: LooseEnd, in_model: AbstractSet[str], matching: list[str]) -> str:
        """Return ``"module"``, ``"experts"`` or ``"nothing"``: what the base has for an entry.

        ``"experts"`` are modules on disk that transformers makes one parameter of, which PEFT skips.

        Args:
            in_model: the entries that mean something in transformers' model.
            matching: names of the stored tensors that this one means.
        """
        if self._model.skeleton is None:
            # An embedding that is tied is not stored.
            return "module" if matching or end.entry in INPUT_NAMES | OUTPUT_NAMES else "nothing"
        if end.entry in in_model:
            return "module"
        # A tensor that the adapter changes is not what the entry lacks; one that transformers does not load (MTP) is
        # nothing to train.
        taken = self._names.taken
        loaded = [name for name in matching if name not in taken and self._model.knows(name)]
        if not loaded:
            return "nothing"
        conversion = self._model.stored.conversion
        assert conversion is not None
        # transformers makes one parameter of these, and PEFT looks for modules.
        in_parts = all(conversion.canonical(name)[1] is not None for name in loaded)
        is_skipped = in_parts and end.field == "target_modules" and not is_rewritten(self._family)
        return "experts" if is_skipped else "module"

    def _in_model(self, meant: _Meant) -> AbstractSet[str]:
        """Return the entries that mean something in transformers' model, by its own names or by the adapter's."""
        known = self._model.skeleton
        if known is None:
            return frozenset()
        found: set[str] = set()
        if meant.field in _OF_PARAMETERS:
            for path, own in known.parameters.items():
                for name in own:
                    found |= meant.by(f"{path}.{name}")
        if meant.field == "target_parameters":
            return found
        for path in known.classes:
            found |= meant.by(path)
        return found | {entry for entry in meant.entries if self._model.module(entry) in known.classes}

    def _stored(self, meant: _Meant) -> dict[str, list[str]]:
        """Return entry → names of the stored tensors that it means, by the names that the adapter would use."""
        stored = self._modules if meant.field != "target_parameters" else {}
        stored = stored | (self._parameters if meant.field in _OF_PARAMETERS else {})
        found: dict[str, list[str]] = {}
        for path, name in stored.items():
            for entry in meant.by(path):
                found.setdefault(entry, []).append(name)
        return found

    @property
    def _family(self) -> str:
        return str(self._model.config.get("model_type"))

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Module of the checkpoint, as the adapter would call it → a stored tensor of it."""
        found: dict[str, str] = {}
        for name in self._model.sources:
            path = self._names.in_adapter(name.rpartition(".")[0])
            # Containers too: an entry may mean all of ``self_attn``.
            while path and path not in found:
                found[path] = name
                path = path.rpartition(".")[0]
        return found

    @cached_property
    def _parameters(self) -> dict[str, str]:
        """Parameter of the checkpoint, as the adapter would call it → its stored name."""
        split = ((name, *name.rpartition(".")[::2]) for name in self._model.sources)
        return {f"{self._names.in_adapter(owner)}.{last}": name for name, owner, last in split}


class _Meant:
    """Entries of one field, looked up by path.

    Args:
        field: that they are from.
        entries: without a tensor of the adapter.
    """

    def __init__(self, field: str, entries: Sequence[str]) -> None:
        self.field, self.entries = field, entries
        self._known = frozenset(entries)
        self._lengths = {len(entry) for entry in entries}

    def by(self, path: str) -> set[str]:
        """Return the entries that mean a path, by the rule that PEFT has for the field.

        Raises:
            TargetError: they are patterns that take too long.
        """
        if self.field == "modules_to_save":
            # One slice per length of entry, so that many entries take no longer. PEFT asks for no dot before one.
            ends = (path[len(path) - n :] for n in self._lengths if n <= len(path))
            return {end for end in ends if end in self._known}
        if self.field in {"rank_pattern", "alpha_pattern"}:
            patterns = patterns_of(self.field, tuple(self.entries), "end")
            return {self.entries[at] for at in patterns.matching(path)}
        return listed_among(self._known, (path,))


def _skipped(field: str, entries: list[str]) -> Issue:
    """Return the issue of entries that the base has nothing for."""
    listed = listing([repr(entry) for entry in sorted(entries)], _LISTED)
    noun = "parameter" if field == "target_parameters" else "module"
    sentence = (
        f"the base has no {noun} called {listed}, so nothing was trained there; PEFT skips such entries too"
    )
    if field in {"rank_pattern", "alpha_pattern"}:
        # A warning here, since PEFT itself warns of patterns and of nothing else.
        sentence = f"{listed} matches no module of the base, and PEFT ignores it"
        return warning("unmatched-pattern", field, sentence)
    return note("unmatched-target", field, sentence)


def _untouched_experts(end: LooseEnd) -> Issue:
    """Return the warning of experts that PEFT adapts with transformers 4 and skips with transformers 5."""
    sentence = (
        f"{end.entry!r} names experts, and the adapter has no tensors for them. transformers 5 stores them "
        "as one parameter, which PEFT skips; with transformers 4 PEFT would have trained them"
    )
    hint = "check which transformers release trained the adapter: with release 4, its file is incomplete"
    return warning("unmatched-target", end.field, sentence, hint)
