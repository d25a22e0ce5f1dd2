"""An adapter of mlx-lm under the names of its base: Hugging Face's, where mlx-lm has others."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.adapters.mlx_names import MlxFamily, family_of, hf_name
from lora_merge.peft_rules.targets import is_listed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.core.adapter import Adapter

_LAYER = re.compile(r"(?:.+?\.)?\d+\.(?P<key>.+)")
"""A module of a layer: ``model.layers.3.self_attn.q_proj``."""


def in_names_of(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """Return an adapter with the names that transformers has for the modules of a base.

    Another format's adapter, and one for a family whose names in mlx-lm are not known, stay as they are.

    Args:
        adapter: from its headers.
        config: the base's ``config.json``.
    """
    family = family_of(config) if adapter.format == "mlx" else None
    if family is None:
        return adapter
    deltas = tuple(replace(delta, parameter=_parameter(delta.parameter, family)) for delta in adapter.deltas)
    return replace(
        adapter,
        deltas=deltas,
        modules=frozenset(hf_name(module, family) for module in adapter.modules),
        replacements={_parameter(name, family): one for name, one in adapter.replacements.items()},
        config={**adapter.config, **_targets(adapter, family)},
    )


def _parameter(name: str, family: MlxFamily) -> str:
    module, dot, leaf = name.rpartition(".")
    return f"{hf_name(module, family)}{dot}{leaf}"


def _targets(adapter: Adapter, family: MlxFamily) -> dict[str, Any]:
    """Return ``target_modules`` in the base's names: a key of a layer stays a key, a whole path stays one."""
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list):
        return {}
    named = set(targets)
    found: dict[str, None] = {}
    for module in sorted(adapter.modules):
        path = hf_name(module, family)
        layer = _LAYER.fullmatch(path)
        # Where paths differ, all are listed whole: mlx-lm has the language model only, and a key would mean the
        # modules of a vision tower too.
        is_key = layer is not None and module not in named and not family.to_hf
        found[layer["key"] if is_key and layer else path] = None
    # Entries without tensors stay, so that planning can look them up in the base.
    lost = [one for one in targets if not any(is_listed(module, (one,)) for module in adapter.modules)]
    return {"target_modules": [*found, *lost]}
