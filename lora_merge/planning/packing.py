"""How B of stacked experts has its columns: in PEFT's order, or expert by expert, as Unsloth trained until September 2026."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.report import Issue, error, warning
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lora_merge.core.adapter import Adapter, Packing

FIELD = "lora_B_layout"
"""Field of ``adapter_config.json`` that Unsloth writes since then (unsloth_zoo, pull requests 1232 and 1269)."""

_PACKINGS: Mapping[object, Packing] = {"rank_major": "interleaved", "grouped_by_expert": "expert-major"}
"""Value of the field → packing."""


def packing_of(adapter: Adapter, expert_layout: Collection[str]) -> Packing:
    """Return the packing of an adapter's stacked factors: as the user says, or as its configuration does, or PEFT's.

    Args:
        adapter: whose format says nothing of it.
        expert_layout: what the user says: ``unsloth`` is expert by expert.
    """
    if "unsloth" in expert_layout:
        return "expert-major"
    return _PACKINGS.get(adapter.config.get(FIELD), "interleaved")


def packing_issues(adapter: Adapter, expert_layout: Collection[str]) -> list[Issue]:
    """Return what is doubtful about the packing of an adapter's stacked factors: shapes never show it."""
    if all(pair.packing for pair in adapter.stacked):
        return []
    told = adapter.config.get(FIELD)
    said = "unsloth" in expert_layout
    if told is not None:
        if told not in _PACKINGS:
            sentence = f"is {quoted(told)}, expected {' or '.join(map(quoted, _PACKINGS))}"
            return [error("unsupported", FIELD, sentence, "use the adapter_config.json of the training")]
        if said and _PACKINGS[told] != "expert-major":
            sentence = f"is {quoted(told)}, and --expert-layout unsloth says the contrary"
            return [error("contradiction", FIELD, sentence, "leave out --expert-layout unsloth")]
        return []
    if said or not _is_by_unsloth(adapter):
        return []
    sentence = (
        "is not there, and the adapter names Unsloth, whose releases before September 2026 order the experts' B "
        "differently; it is read in the order of PEFT and of later releases"
    )
    hint = "if an earlier release trained it, pass --expert-layout unsloth"
    return [warning("unsloth-experts", FIELD, sentence, hint)]


def _is_by_unsloth(adapter: Adapter) -> bool:
    """Return True where a configuration has a mark of Unsloth, or names one of its copies as the base."""
    mapping = adapter.config.get("auto_mapping")
    is_marked = isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed"))
    return is_marked or str(adapter.config.get("base_model_name_or_path") or "").startswith("unsloth/")
