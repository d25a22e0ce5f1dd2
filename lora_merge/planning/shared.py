"""Weights that are stored once and used by several modules: their users, and what a change of one user means.

Zamba has one attention block in several layers, DiffusionGemma one stack of layers in encoder and decoder. PEFT wraps
each user on its own, so an adapter may change one and leave the others. transformers loads a tensor for each user
where both are stored and differ (``modeling_utils.tie_weights``, transformers 5.23), so they can be written apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from lora_merge.core.report import Issue, error, warning
from lora_merge.peft_rules.hints import SERVE_UNMERGED
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from lora_merge.layouts import Stored


_Change = TypeVar("_Change")


@dataclass(frozen=True, slots=True)
class Shared:
    """One weight of several modules, under the names that its users have in the checkpoint, or would have."""

    users: tuple[str, ...]
    """The parameter that transformers takes the values from comes first."""

    holder: str
    """The stored tensor that has the values; empty where they are stored in parts."""

    parts: tuple[str, ...] = ()
    """The stored tensors that have the values in parts."""

    def unstored(self, stored: Collection[str]) -> tuple[str, ...]:
        """Return the users without their own tensor."""
        return tuple(name for name in self.users if name not in stored)


def shared_weights(tied: Mapping[str, str], stored: Stored) -> tuple[Shared, ...]:
    """Return the weights of a checkpoint that have several users, each with the stored tensors that hold it.

    Args:
        tied: parameter → the parameter whose storage it shares, as transformers' model has it.
        stored: the checkpoint.
    """
    groups: dict[str, list[str]] = {}
    for target, source in tied.items():
        groups.setdefault(source, [source]).append(target)
    parts: dict[str, list[str]] = {}
    if groups and stored.conversion is not None:
        members = {name for group in groups.values() for name in group}
        for name in stored.tensors:
            parameter, pattern = stored.conversion.canonical(name)
            # A converter makes the parameter from several tensors, so none of them is the weight.
            if pattern is not None and parameter in members:
                parts.setdefault(parameter, []).append(name)
    found = []
    for group in groups.values():
        users = tuple(stored.disk_name(parameter) for parameter in group)
        holder = next((name for name in users if name in stored.tensors), "")
        pieces = tuple(name for parameter in group for name in parts.get(parameter, ()))
        if holder or pieces:
            found.append(Shared(users, holder, pieces))
    return tuple(found)


def to_write(
    shared: Shared,
    anchor: str,
    wanted: Mapping[str, _Change],
    alike: Callable[[_Change, _Change], bool],
) -> tuple[str, ...]:
    """Return the users that need their own tensor, since they change differently from the anchor.

    Args:
        shared: the weight.
        anchor: the user whose tensor is written in any case.
        wanted: what is done to the anchor, and to each user without a tensor.
        alike: tells whether two changes have the same outcome.
    """
    own = [name for name in wanted if name != anchor and not alike(wanted[name], wanted[anchor])]
    source = shared.users[0]
    if own and source in wanted and source not in {anchor, *own}:
        own.append(source)  # transformers would tie it to the first of its users that is stored
    return tuple(own)


def split_issue(pairs: Mapping[str, str]) -> list[Issue]:
    """Return a warning where users of one weight get a tensor each; nothing where none does.

    Args:
        pairs: user that is written out → stored tensor that it shared.
    """
    if not pairs:
        return []
    name, *others = pairs
    sentence = (
        f"has the same values as {pairs[name]} in the base, and the adapter changes the two differently; the "
        "output stores both"
    )
    sentence += f"; the same is true of {listing(others)}" if others else ""
    hint = "check that your engine loads both, as transformers does, if it has its own code for this model"
    return [warning("split", name, sentence, hint)]


def in_parts_issue(shared: Shared, changed: str) -> Issue:
    """Return the error of a weight whose users cannot be written apart, since it is stored in parts."""
    users = " and ".join(shared.users[:2])
    sentence = (
        f"is one stored weight that {users} share, and the adapter changes only some of them; the base's "
        "layout cannot store separate weights"
    )
    return error("unsupported", changed, sentence, SERVE_UNMERGED)


def unlike_rows_issue(name: str, other: str) -> Issue:
    """Return the error of different trained rows for two users of one weight.

    Args:
        name: one of the users.
        other: the other.
    """
    sentence = f"uses the same weight as {other}, and the adapter has different trained rows for the two"
    hint = (
        "save or download the adapter again: PEFT trains one set of rows for both, so this file is damaged "
        "or was edited"
    )
    return error("token-mismatch", name, sentence, hint)
