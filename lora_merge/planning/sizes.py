"""An adapter of a model of another size: one issue, before all that follow from it in every module."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.report import Issue, error
from lora_merge.layouts import LayoutError
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_merge.core.adapter import Adapter, Delta
    from lora_merge.planning.model import Model

_FOLLOWS = frozenset({"shape-mismatch", "unmatched-module", "missing-module"})
"""Codes of issues that every module has when the base is of another size."""

_MANY = 4
"""How many of these it takes; fewer explain themselves."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
"""What configurations call the size of the hidden state."""


def other_size(adapter: Adapter, model: Model, issues: Sequence[Issue]) -> list[Issue]:
    """Return an issue when an adapter was trained on a model with another number of layers or another width.

    Args:
        adapter: one adapter.
        model: the base.
        issues: what was found wrong with the two.
    """
    if sum(issue.code in _FOLLOWS and issue.severity == "error" for issue in issues) < _MANY:
        return []
    layers = _n_layers(adapter.modules), _n_layers(model.sources)
    widths = _widths(adapter.deltas, model)
    # It was meant for some layers only, so fewer of them tell nothing.
    if adapter.config.get("layers_to_transform") is not None and layers[0] < layers[1]:
        layers = (0, 0)
    codes = {issue.code for issue in issues}
    other_layers = layers[0] != layers[1] and all(layers) and codes & {"unmatched-module", "missing-module"}
    other_widths = widths[0] != widths[1] and all(widths) and "shape-mismatch" in codes
    if not (other_layers or other_widths):
        return []
    # Only sizes that are known of both are worth comparing.
    trained, has = (_said(layers[n] if all(layers) else 0, widths[n] if all(widths) else 0) for n in (0, 1))
    named = adapter.config.get("base_model_name_or_path")
    hint = "merge into the base that the adapter was trained on" + (f": it names {named}" if named else "")
    return [error("other-size", adapter.root, f"was trained on {trained}; this base has {has}", hint)]


def _said(n_layers: int, width: int) -> str:
    """Return a model's size in words, as far as it is known."""
    parts = [counted(n_layers, "layer")] if n_layers else []
    return ", ".join([*parts, *([f"hidden size {width}"] if width else [])])


def _n_layers(names: Iterable[str]) -> int:
    """Return the largest number of a layer in some names, plus one; 0 where they name no layer."""
    numbers = (int(match[1]) for name in names for match in [_LAYER.search(f"{name}.")] if match)
    return max(numbers, default=-1) + 1


def _widths(deltas: Iterable[Delta], model: Model) -> tuple[int, int]:
    """Return the hidden size that an adapter was trained on, and the base's; zeros where they are unknown."""
    # Conv1D stores its weights as [in, out].
    axis = 0 if model.may_hold_conv1d else 1
    levels = [level for _, level in config_levels(model.config)]
    known = {level[field] for level in levels for field in _WIDTHS if isinstance(level.get(field), int)}
    # Most modules read the hidden state. Where the base's weight does, the width of the adapter's A is its hidden
    # size; the most frequent pair wins.
    found: Counter[tuple[int, int]] = Counter()
    for delta in deltas:
        shape = _shape(delta, model)
        if delta.facts.has_factors and not delta.transposed and len(shape) == 2 and shape[axis] in known:
            found[delta.shape("A")[1], shape[axis]] += 1
    return found.most_common(1)[0][0] if found else (0, 0)


def _shape(delta: Delta, model: Model) -> tuple[int, ...]:
    """Return the shape of the base's weight of this name; empty where it is not stored whole."""
    try:
        found = model.locate(delta.parameter, None)
    except LayoutError:
        return ()
    return model.source(found.whole).shape if found is not None and found.whole is not None else ()
