"""Modules that become dense among quantised ones: how the configuration says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lora_merge.core.weight import Weight


def excepting(
    settings: Mapping[str, Mapping[str, Any]], modules: Collection[str], weights: Mapping[str, Weight]
) -> dict[str, Mapping[str, Any]]:
    """Return the tables that change where some modules are stored dense from now on: place → new table.

    Args:
        settings: what says how weights are quantised, as `identify` found it.
        modules: paths of the modules that become dense: names of weights without ``.weight``; of a stack of experts,
            the parameter's own name.
        weights: all weights of the checkpoint, as they were before.
    """
    raise NotImplementedError
