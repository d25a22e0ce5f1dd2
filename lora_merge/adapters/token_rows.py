"""Trained rows of embeddings: ``trainable_token_indices`` of a LoRA, and adapters of type TRAINABLE_TOKENS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.tensor_names import plain
from lora_merge.core.adapter import Delta
from lora_merge.core.report import Issue, error
from lora_merge.core.tensor import TensorRef
from lora_merge.deltas import RowsFacts
from lora_merge.peft_rules.hints import INCOMPLETE, OTHER_CONFIG
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Collection

Group = Mapping[str, TensorRef]


def token_rows(groups: Mapping[str, Group], config: Mapping[str, Any], issues: list[Issue]) -> list[Delta]:
    """Return a delta for each embedding with trained rows; rows that do not fit the configuration are issues.

    Args:
        groups: tensors of the adapter, by module and role.
        config: PEFT's.
        issues: faults are added here.

    Raises:
        TargetError: the field holds neither a list nor a table.
    """
    field = "token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    wanted = config.get(field)
    if wanted is not None and not isinstance(wanted, list | dict):
        raise TargetError(field, f"is {quoted(wanted)}, expected a list or a table")
    deltas = []
    rows = {module: group["tokens"] for module, group in groups.items() if "tokens" in group}
    if wanted and not rows:
        hint = INCOMPLETE
        issues.append(error("missing-tokens", field, "the file has no trained rows for it", hint))
    for module, ref in rows.items():
        indices = _indices_of(module, wanted, rows)
        if indices is None or len(indices) != ref.shape[0] or len(set(indices)) != len(indices):
            count = "no" if indices is None else str(len(set(indices)))
            sentence = f"has {ref.shape[0]} rows, and {field} names {count} tokens for it"
            issues.append(error("token-mismatch", ref.name, sentence, OTHER_CONFIG))
            continue
        deltas.append(Delta(f"{plain(module)}.weight", RowsFacts(tuple(indices)), {"rows": ref}))
    return deltas


def _indices_of(module: str, wanted: object, modules: Collection[str]) -> list[int] | None:
    """Return the tokens that a configuration names for an embedding; None where it names none, or no whole numbers."""
    if isinstance(wanted, dict):
        named = {
            name: indices for name, indices in wanted.items() if any(one.endswith(name) for one in modules)
        }
        # PEFT saves the rows of both ends of a tie where the vocabulary was resized, whichever end is named.
        alone = next(iter(named.values())) if len(wanted) == len(named) == 1 else None
        wanted = next((indices for name, indices in wanted.items() if module.endswith(name)), alone)
    if isinstance(wanted, list) and all(isinstance(index, int) for index in wanted):
        return wanted
    return None
