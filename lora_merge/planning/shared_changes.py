"""What is done to each user of a weight that is stored once, and which users get their own tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.planning.change import Change
from lora_merge.planning.shared import Shared, in_parts_issue, split_issue, to_write, unlike_rows_issue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from lora_merge.core.report import Issue
    from lora_merge.planning.model import Model
    from lora_merge.planning.outline import Outline


class Separation:
    """The users of shared weights, once all adapters are fitted and the ends of a tie are settled.

    Args:
        model: the base.
        outline: of the output so far.
        changes: what is done to each tensor, by name; users without a tensor included.
        follow: name of the input embedding, its change, another user's → that user's, with what it shares.
        alike: tells whether two changes have the same outcome.
    """

    def __init__(
        self,
        model: Model,
        outline: Outline,
        changes: Mapping[str, Change],
        *,
        follow: Callable[[str, Change, Change], Change | None],
        alike: Callable[[Change, Change], bool],
    ) -> None:
        self._model = model
        self._follow, self._alike = follow, alike
        self._ends = {model.tie.embedding, model.tie.head} if model.tie is not None else frozenset()
        self.outline = outline
        """With the tensors that are written apart."""
        self.changes = dict(changes)
        """With what is done to those."""

    def settle(self, *, write_all: bool) -> list[Issue]:
        """Give each user that changes differently from the rest a tensor, and return a warning.

        Args:
            write_all: whether the output's config no longer says that anything is tied.
        """
        issues = []
        written: dict[str, str] = {}
        for shared in self._model.shared:
            # The ends of the embeddings' tie were settled before.
            free = [name for name in shared.unstored(self._model.sources) if name not in self._ends]
            if not shared.holder:
                changed = next((name for name in (*shared.parts, *free) if name in self.changes), "")
                # The base's layout has no names for separate weights. Where the flag is cleared, even unchanged users
                # need them.
                if changed or write_all:
                    issues.append(in_parts_issue(shared, changed or shared.parts[0]))
                continue
            issues += self._unlike_rows(shared, free)
            written |= self._separate(shared, free, write_all=write_all)
        return issues + split_issue(written)

    def _unlike_rows(self, shared: Shared, users: list[str]) -> list[Issue]:
        """Return an error where trained rows of users of one weight differ.

        Reference:
            ``peft.tuners.trainable_tokens.layer.TrainableTokensLayer`` with a ``tied_adapter`` (PEFT 0.21.2): one set
            of rows
            is trained for all of them.
        """
        changes = [(name, self.changes[name]) for name in (*shared.users[:1], *users) if name in self.changes]
        trained = [
            (name, change)
            for name, change in changes
            if any(one.facts.replaces_rows for one in change.deltas)
        ]
        return [
            unlike_rows_issue(name, trained[0][0])
            for name, change in trained[1:]
            if not self._alike(
                replace(change, own=None, copy=None), replace(trained[0][1], own=None, copy=None)
            )
        ]

    def _separate(self, shared: Shared, free: list[str], *, write_all: bool) -> dict[str, str]:
        """Settle one weight; return user that differs → stored tensor that it shared."""
        anchor = shared.users[0] if shared.users[0] in self.outline.sources else shared.holder
        self._spread(anchor, free)
        wanted = {name: self._wanted(name, anchor, shared) for name in (anchor, *free)}
        own = to_write(shared, anchor, wanted, self._alike)
        for name in free:
            # A user without a tensor has no separate change, unless it gets a tensor now.
            self.changes.pop(name, None)
            if name in own or write_all:
                self.outline = self.outline.with_twin(anchor, name)
                self.changes[name] = wanted[name]
        if wanted[anchor] != Change():
            self.changes[anchor] = wanted[anchor]
        return dict.fromkeys(own, anchor)

    def _spread(self, anchor: str, users: list[str]) -> None:
        """Give the anchor a tensor that PEFT loads into the base under another user's name."""
        found = [self.changes[name] for name in (anchor, *users) if name in self.changes]
        loaded = next((change.copy for change in found if change.copy is not None), None)
        change = self.changes.get(anchor, Change())
        if change.copy is None and loaded is not None:
            self.changes[anchor] = replace(change, copy=loaded)

    def _wanted(self, name: str, anchor: str, shared: Shared) -> Change:
        """Return what is done to one user, with what it shares by PEFT's rules.

        Args:
            name: the user.
            anchor: the user whose tensor is written in any case.
            shared: the weight.

        Reference:
            ``peft.utils.other._get_module_names_tied_with_embedding`` (PEFT 0.21.2): what is tied to another parameter
            follows the input embedding; the parameter that it is tied to does not.
        """
        first, own = (self.changes.get(one, Change()) for one in (anchor, name))
        lead = self._model.input_embedding
        if lead in shared.users and name in shared.users[1:] and name != lead and name not in self._ends:
            own = self._follow(lead, self.changes.get(lead, Change()), own) or Change()
        return replace(own, copy=first.copy or own.copy)
