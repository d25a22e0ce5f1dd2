"""Entries of an adapter's configuration without any tensor of the adapter.

PEFT skips an entry that matches no module without a message. Only the base tells whether that is what happened, or
whether the adapter's file is incomplete.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, warning
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.peft_rules.scaling import Scaling
from lora_merge.peft_rules.targets import saved_among
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lora_merge.core.adapter import Adapter

_HEADS = ({"classifier", "score"}, {"classifier", "score", "qa_outputs"}, {"qa_outputs"})
"""What PEFT adds to ``modules_to_save`` for a task; a model has one of each set
(``peft.peft_model.PeftModelForSequenceClassification``, PEFT 0.21.2)."""


@dataclass(frozen=True, slots=True)
class LooseEnd:
    """One entry of one field, and the issue that it is if the base has something for it."""

    field: str
    entry: str
    code: str
    sentence: str
    hint: str = ""

    def issue(self) -> Issue:
        """Return the error: the base has what the entry names, so its tensors should be there."""
        return error(self.code, self.field, self.sentence, self.hint)


def unsaved(adapter: Adapter) -> list[LooseEnd]:
    """Return each entry of ``modules_to_save`` without a tensor."""
    entries = adapter.config.get("modules_to_save") or []
    owners = {parameter.rpartition(".")[0] for parameter in adapter.replacements}
    answered = saved_among(frozenset(entries), owners)
    absent = [entry for entry in entries if entry not in answered]
    alternatives = any(set(entries) >= heads and set(absent) < heads for heads in _HEADS if len(heads) > 1)
    if alternatives:
        # PEFT lists every name that a task's head may have, and a model has one of them.
        absent = [entry for entry in absent if not any(entry in heads for heads in _HEADS)]
    hint = "save or download the adapter again if its file is incomplete; otherwise this entry never matched"
    return [
        LooseEnd(
            "modules_to_save",
            entry,
            "missing-module",
            f"has the entry {quoted(entry)}, and no tensor in the file belongs to it",
            hint,
        )
        for entry in absent
    ]


def unmatched_patterns(adapter: Adapter, paths: Iterable[str]) -> list[LooseEnd]:
    """Return each key of ``rank_pattern`` and ``alpha_pattern`` that matches no module or parameter.

    Args:
        adapter: a LoRA.
        paths: its modules, and the parameters of its ``target_parameters``.

    Raises:
        TargetError: a field has a value that PEFT could not use.
    """
    known = tuple(paths)
    return [
        LooseEnd(
            field,
            key,
            "unmatched-pattern",
            f"{quoted(key)} matches none of the adapter's {len(known)} modules",
        )
        for field, key in Scaling(adapter.config).unmatched(known)
    ]


def without_base(adapter: Adapter) -> list[Issue]:
    """Return a warning for each entry without tensors: only the base could tell whether it is a fault."""
    hint = "pass the base with --base to check whether it has such a module"
    ends = unsaved(adapter)
    if adapter.kind == "LORA" and not adapter.stacked and adapter.deltas:
        try:
            ends += unmatched_patterns(adapter, adapter.modules)
        except TargetError as exc:
            return [exc.issue]
    return [warning(end.code, end.field, end.sentence, hint) for end in ends]
