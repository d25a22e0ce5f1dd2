"""The ``adapter_config.json`` of a LoRA: what its modules need said, in fields that every PEFT since 0.14 reads."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from lora_merge.peft_rules.kinds import mutating_init

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from lora_merge.conversion.lora import Made, Recipe
    from lora_merge.core.adapter import Adapter

_PLAIN: Mapping[str, Any] = {
    "peft_type": "LORA",
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "task_type": None,
    "inference_mode": True,
    "r": 8,
    "lora_alpha": 8,
    "target_modules": None,
    "lora_dropout": 0.0,
    "fan_in_fan_out": False,
    "bias": "none",
    "use_rslora": False,
    "modules_to_save": None,
    "init_lora_weights": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
}
"""Fields that ``LoraConfig`` has had since PEFT 0.9, with what says nothing. An older PEFT refuses any other."""

_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that say nothing more once the targets are listed."""

_KEPT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "fan_in_fan_out",
    "bias",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
    "layer_replication",
    "target_modules",
    "target_parameters",
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    *_CHOOSING,
)
"""Fields that mean the same before and after, unless a transform settles what they say."""

_WHOLE = (
    "bias",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
"""Fields about what is no LoRA."""

_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Tasks whose head PEFT trains as a whole, whatever ``modules_to_save`` says."""

_WITH_EXPERTS = "0.19.1"
"""The release of PEFT whose orientation of stacked experts is written."""


def adapter_config(
    adapter: Adapter,
    made: Sequence[Made],
    recipe: Recipe,
    base_modules: Iterable[str] = (),
    whole: Collection[str] = (),
) -> dict[str, Any]:
    """Return the configuration of the adapter that is written.

    Args:
        adapter: what it was made of.
        made: its modules.
        recipe: what was done.
        base_modules: every module of the base, if that is at hand: then a name may stand for all modules that end in
            it.
        whole: names of the tensors that are carried whole.
    """
    kept = {name: adapter.config[name] for name in _KEPT if _says_something(adapter.config, name)}
    if recipe.to_lora:
        kept = {
            name: value for name, value in kept.items() if name not in _WHOLE and value not in _WITH_HEADS
        }
    config = {**_PLAIN, **kept}
    if mutating_init(adapter.config) and not recipe.to_lora:
        config["init_lora_weights"] = adapter.config["init_lora_weights"]
    experts = [one for one in made if one.module.form == "experts"]
    is_default = adapter.config.get("target_modules") is None and len(made) > len(experts)
    if recipe.explicit or recipe.is_renamed or is_default:
        config |= dict.fromkeys(_CHOOSING)
        del config["exclude_modules"]
        others = [one.module.path for one in made if one.module.form != "experts"]
        known = () if config.get("layer_replication") else base_modules  # that has other layers
        config["target_modules"] = listed(others, frozenset(known))
        config.pop("target_parameters", None)
        if experts:
            config["target_parameters"] = [one.module.path for one in experts]
    if not any(name.endswith(".bias") and "lora_" not in name for name in whole):
        config["bias"] = "none"
    if recipe.is_rescaled or recipe.is_renamed or _is_loose(config, made):
        config |= scaling({one.module.path: (one.rank, one.scale) for one in made})
    if experts:
        config["peft_version"] = _WITH_EXPERTS if recipe.experts else adapter.config.get("peft_version")
    return dict(sorted(config.items()))


def _says_something(config: Mapping[str, Any], name: str) -> bool:
    """Return True for a field that is not what a missing one is: no targets is not the same as PEFT's own choice."""
    return bool(config.get(name)) or (name in _PLAIN and config.get(name) is not None)


def module_paths(parameters: Iterable[str]) -> frozenset[str]:
    """Return the path of everything that parameters belong to, containers included.

    Example:
        >>> sorted(module_paths(["l.0.q.weight"]))
        ['l', 'l.0', 'l.0.q']
    """
    found: set[str] = set()
    for name in parameters:
        path = name.rpartition(".")[0]
        while path and path not in found:
            found.add(path)
            path = path.rpartition(".")[0]
    return frozenset(found)


def _is_loose(config: Mapping[str, Any], made: Sequence[Made]) -> bool:
    """Return True when a configuration names ranks that no module has: an engine makes room for the largest."""
    ranks = {one.rank for one in made}
    return (
        config["init_lora_weights"] is True and not {config["r"], *config["rank_pattern"].values()} <= ranks
    )


def listed(paths: Sequence[str], base_modules: Collection[str]) -> list[str] | str:
    """Return names that mean these modules and no others, to PEFT: the last part of a path where that is enough.

    PEFT takes every module that ends in a name. Where another one of the base ends in a whole path, only a regex of
    the paths tells the two apart.

    Example:
        >>> listed(["l.0.q", "l.1.q", "l.0.v"], ["l.0.q", "l.1.q", "l.0.v", "l.1.v"])
        ['l.0.v', 'q']
    """
    own, all_of_base = (Counter(path.rpartition(".")[2] for path in found) for found in (paths, base_modules))
    short = {name for name, count in own.items() if all_of_base[name] == count and not name.isdecimal()}
    names = {name if (name := path.rpartition(".")[2]) in short else path for path in paths}
    others = set(base_modules).difference(paths) if set(paths) <= set(base_modules) else ()
    if any(not names.isdisjoint(_endings(other)) for other in others):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(names)


def _endings(path: str) -> Iterator[str]:
    """Yield the ends of a path that PEFT would know it by."""
    while path:
        yield path
        path = path.partition(".")[2]


def scaling(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return ``r``, ``lora_alpha`` and the patterns that give each module its rank and its scale, as α/r.

    Example:
        >>> scaling({"l.0.q": (4, 1.0), "l.1.q": (4, 1.0), "l.0.v": (8, 2.0)})["alpha_pattern"]
        {'v': 16}
    """
    ranks = {path: rank for path, (rank, _) in modules.items()}
    alphas = {path: _number(rank * scale) for path, (rank, scale) in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
    }


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return the entries that give each path its value: by the last part of the path where all that end so agree.

    PEFT looks for a regex at the end of a path, so that a whole path has to be held at its start.
    """
    by_end: dict[str, set[float]] = {}
    for path, value in values.items():
        by_end.setdefault(path.rpartition(".")[2], set()).add(value)
    table = {}
    for path, value in values.items():
        end = path.rpartition(".")[2]
        if value != default:
            table[re.escape(end) if len(by_end[end]) == 1 else f"^{re.escape(path)}"] = value
    return dict(sorted(table.items()))


def _number(value: float) -> float:
    """Return a number as JSON is best read: whole where it is whole."""
    return int(value) if float(value).is_integer() else value
