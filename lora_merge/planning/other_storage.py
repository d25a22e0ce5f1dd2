"""Was an adapter trained on these weights, or on another copy of the model, stored in another way? And does it matter?

QLoRA trains against decoded weights, decode(q(W)), and not against W. Nothing is fetched to find that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.adapter import PlacedDelta
from lora_merge.core.report import Issue, Silence, note, warning
from lora_merge.core.weight import Weight
from lora_merge.errors import LoraMergeError
from lora_merge.planning.base_names import (
    folder_of,
    is_this_copy,
    is_this_model,
    named_bases,
    names_in,
    other_base,
    quantisation_in,
)
from lora_merge.planning.distance import distances
from lora_merge.planning.joined import Joined
from lora_merge.planning.locate import Place, locate_base
from lora_merge.planning.resolve import resolve_base
from lora_merge.planning.trained_on import sign_of
from lora_merge.quantised import describe, folds_norms
from lora_merge.quantised.tables import tables_of
from lora_merge.storage.hub import Access
from lora_merge.storage.same_model import quantised_words
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from lora_merge.core.checkpoint import Checkpoint

CODE = "other-storage"

MOST = 10.0
"""‖q‖ / ‖Δ‖ above which the copies differ by so much more than the adapter changes that the merge may be useless."""


def storage_doubts(base: Place, adapters: Sequence[Place], joined: Joined) -> tuple[Issue, ...]:
    """Return what is to be said of each adapter about the copy of the base that it was trained on.

    Where the copy that it names is on this machine, some rows of both are read. Of adapters of another model, nothing
    is said here: `other_base` does.

    Args:
        base: what is merged into.
        adapters: what is merged.
        joined: both, read and joined.
    """
    if not joined.is_whole or any(issue.severity == "error" for issue in joined.issues):
        return ()
    issues = []
    for n, adapter in enumerate(adapters):
        config = joined.uses[n].adapter.config
        changed, deltas = _changed(joined, n)
        if changed and not other_base(base, (adapter,), (config,)):
            issues.append(_Trained(base, adapter, joined, names_in(adapter, config), changed, deltas).doubt())
    return tuple(issue for issue in issues if issue is not None)


def _changed(joined: Joined, n: int) -> tuple[dict[str, Weight], dict[str, Sequence[PlacedDelta]]]:
    """Return the base's weights that an adapter changes, and what it changes them by."""
    deltas = {
        name: tuple(delta for delta in change.deltas if delta.adapter == n)
        for name, change in joined.changes.items()
    }
    deltas = {name: own for name, own in deltas.items() if own and name in joined.outline.sources}
    return {name: joined.outline.sources[name] for name in deltas}, dict(deltas)


@dataclass(frozen=True, slots=True)
class _Trained:
    """One adapter on the base, and the names that it has for the base of its training."""

    base: Place
    adapter: Place
    joined: Joined
    names: Sequence[str]
    changed: Mapping[str, Weight]
    deltas: Mapping[str, Sequence[PlacedDelta]]

    def doubt(self) -> Issue | None:
        """Return what is to be said; None where there is nothing."""
        quantisation = self.joined.base.quantisation
        if any(is_this_copy(name, self.base, quantised=bool(quantisation)) for name in self.names):
            return self._on_this_copy()
        named = self._named()
        folded = self._folded(named)
        if folded is not None:
            return folded
        if named is not None:
            return self._measured(named)
        return self._in_words()

    def _on_this_copy(self) -> Issue | None:
        kinds = _kinds(self.changed.values())
        if kinds:
            sentence = (
                f"is stored quantised ({kinds}), and the adapter {self.adapter.text} was trained on it; it "
                "is decoded, so the output computes what training computed"
            )
            return note(CODE, self.base.text, sentence)
        sign = sign_of(self.adapter.root)
        if sign is None or self.joined.base.quantisation:
            return None
        sentence = (
            f"{_was_quantised(self.adapter, sign.words, sign.file)}. This base is not rounded that way; to "
            "get what training computed, merge into a copy that is quantised with the same settings"
        )
        return note(CODE, self.base.text, sentence)

    def _folded(self, named: Checkpoint | None) -> Issue | None:
        """Return a warning where one of the two copies had scales folded into norms: then the others do not fit it."""
        name = self.names[0] if self.names else ""
        if folds_norms(self.joined.base.quantisation):
            trained = f"names {name}" if name else "does not say which base it was trained on"
            sentence = (
                "was quantised by AWQ, which also rescales norms and other weights, so an adapter that was "
                f"trained on the original model does not fit; {self.adapter.text} {trained}"
            )
            where = f"--base {name}" if name else "--base ORIGINAL"
            hint = (
                f"merge into the base that the adapter was trained on: {where}; ignore this if it was "
                "trained on this checkpoint"
            )
            return warning("folded-norms", self.base.text, sentence, hint)
        is_folded = folds_norms(named.quantisation) if named else "awq" in quantised_words(name)
        if not is_folded:
            return None
        sentence = (
            f"the adapter {self.adapter.text} was trained on {name}, which AWQ quantised. Its norms and "
            "other weights are scaled differently from this base's, so the adapter does not fit"
        )
        return warning("folded-norms", self.base.text, sentence, f"merge into --base {name}")

    def _measured(self, named: Checkpoint) -> Issue | None:
        """Return how far the copies are apart; None where they are alike in all that the adapter changes."""
        others = named.parameters()
        trained = [others[weight.name] for weight in self.changed.values() if weight.name in others]
        theirs, ours = _kinds(trained), _kinds(self.changed.values())
        if not theirs and not ours:
            return None
        try:
            found = distances(self.changed, others, self.deltas)
        except LoraMergeError:  # the merge does not need that copy
            found = {}
        if not found:
            return self._in_words(theirs)
        import statistics  # takes long to import, and few merges need it

        worst, largest = max(found.items(), key=lambda one: one[1])
        if not largest:
            return None
        name = self.names[0]
        sentence = (
            f"the adapter {self.adapter.text} was trained on {name} ({theirs or 'full precision'}), and this "
            f"base is {ours or 'full precision'}. The difference between the two is "
            f"{_times(statistics.median(found.values()))} as large as the adapter's change (median of "
            f"{counted(len(found), 'tensor')}), and {_times(largest)} in {worst}"
        )
        if largest > MOST:
            hint = f"merge into --base {name} to get what training computed"
            return warning(CODE, self.base.text, sentence, hint)
        return note(
            CODE, self.base.text, f"{sentence}. Merge into --base {name} to get what training computed"
        )

    def _in_words(self, theirs: str = "") -> Issue | None:
        """Return what names and files tell of the other copy, without its weights.

        Args:
            theirs: how its weights are stored, where that is known.
        """
        if not self.names:
            return None
        name, ours = self.names[0], _kinds(self.changed.values())
        sign = sign_of(self.adapter.root)
        methods = {table.method for table in tables_of(self.joined.base.quantisation)}
        if ours and sign is not None and sign.method in methods:
            sentence = (
                f"{_was_quantised(self.adapter, sign.words, sign.file)}. This copy ({ours}) is decoded, and "
                "gives what training computed if it was quantised with the same settings"
            )
        elif ours and is_this_model(name, self.base):
            sentence = (
                f"is a quantised copy ({ours}), and the adapter {self.adapter.text} was trained on {name}, "
                f"without this rounding. Merge into --base {name} to get what training computed"
            )
        elif not ours and (theirs or quantised_words(name)):
            sentence = (
                f"the adapter {self.adapter.text} was trained on {name}, which is stored quantised, and this "
                f"base does not have that rounding. Merge into --base {name} to get what training computed"
            )
        else:
            return None
        return note(CODE, self.base.text, sentence)

    def _named(self) -> Checkpoint | None:
        """Return the copy that the adapter names, where it is on this machine and one of the two is quantised."""
        is_quantised = bool(self.joined.base.quantisation)
        for folder in self._folders():
            try:
                if folder == self.base.root or not (is_quantised or quantisation_in(folder)):
                    continue
                found = resolve_base(folder)
            except (LoraMergeError, OSError):  # incomplete, or of another kind: the merge does not need it
                continue
            if not any(issue.severity == "error" for issue in found.issues):
                return found
        return None

    def _folders(self) -> Iterable[Path]:
        """Yield the folders on this machine that the adapter's names lead to, in the cache of a hub too."""
        yield from (folder for name in self.names if (folder := folder_of(name)) is not None)
        is_quantised = bool(self.joined.base.quantisation)
        for name, source in named_bases(self.adapter):
            # The hub's package takes long to import, so its cache is asked only where that can matter.
            can_differ = is_quantised or quantised_words(name) or is_this_model(name, self.base)
            if source is not None and can_differ and folder_of(name) is None:
                try:
                    yield locate_base(source, name, Access(offline=True), Silence()).whole()
                except (LoraMergeError, OSError):
                    continue


def _kinds(weights: Iterable[Weight]) -> str:
    """Return how weights are quantised, for messages; empty where all are dense."""
    storages = dict.fromkeys(weight.storage for weight in weights if weight.plain is None)
    return listing(list(dict.fromkeys(map(describe, storages))), 2)


def _was_quantised(adapter: Place, words: str, file: str) -> str:
    return (
        f"the adapter {adapter.text} was trained on a base that its trainer had quantised ({words}), "
        f"according to its {file}"
    )


def _times(ratio: float) -> str:
    return f"{ratio:.0f} times" if ratio >= 10 else f"{ratio:.2g} times"
