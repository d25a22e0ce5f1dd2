"""The ``adapter_config.json`` of a written LoRA, in fields that every PEFT since 0.14 reads."""

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
"""Fields that ``LoraConfig`` has had since PEFT 0.9, with neutral values. An older PEFT refuses any other field."""

_CHOOSING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Fields that choose among targets. They have no effect once the targets are listed."""

_WHOLE = (
    "bias",
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
"""Fields about parts that are not LoRA. ``to_lora`` leaves none of these parts, so the fields go too."""

_KEPT = (
    "base_model_name_or_path",
    "revision",
    "task_type",
    "fan_in_fan_out",
    *_WHOLE,
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
"""Fields that are copied, unless a transform sets them."""

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
    """Return the fields of ``adapter_config.json``, sorted by name.

    Fields that mean the same before and after are copied. Targets are listed again where a transform renamed modules or
    the adapter relied on PEFT's defaults; rank and α are written again where a transform changed them.

    Args:
        adapter: the source; its configuration is the starting point.
        made: the modules that are written, with their ranks and scales.
        recipe: what was done.
        base_modules: every module of the base, if it is at hand. Then a short name may mean all modules that end in
            it.
        whole: names of the tensors that are carried whole.
    """
    kept = {name: adapter.config[name] for name in _KEPT if _says_something(adapter.config, name)}
    if recipe.to_lora:
        kept = {
            # A task with a head goes as well: PEFT would add a trained head, which plain LoRA does not have.
            name: value
            for name, value in kept.items()
            if name not in _WHOLE and value not in _WITH_HEADS
        }
    config = {**_PLAIN, **kept}
    # Such an initialisation changed the base before training, so a reader has to repeat it. After ``to_lora``
    # the factors are relative to the published base.
    if mutating_init(adapter.config) and not recipe.to_lora:
        config["init_lora_weights"] = adapter.config["init_lora_weights"]
    experts = [one for one in made if one.module.form == "experts"]
    is_default = adapter.config.get("target_modules") is None and len(made) > len(experts)
    if recipe.explicit or recipe.is_renamed or is_default:
        # A complete list replaces patterns, layers and exclusions.
        config |= dict.fromkeys(_CHOOSING)
        # An older PEFT refuses this field even with null: it is not one of `_PLAIN`.
        del config["exclude_modules"]
        others = [one.module.path for one in made if one.module.form != "experts"]
        known = () if config.get("layer_replication") else base_modules  # that has other layers
        config["target_modules"] = listed(others, frozenset(known))
        # Experts on ``target_parameters`` are listed below; a leftover entry would name parameters that are
        # not written.
        config.pop("target_parameters", None)
        if experts:
            config["target_parameters"] = [one.module.path for one in experts]
    # Engines refuse ``bias`` by its value alone, even if no bias is stored (the trait ``bias-said``).
    if not any(name.endswith(".bias") and "lora_" not in name for name in whole):
        config["bias"] = "none"
    if recipe.is_rescaled or recipe.is_renamed or _is_loose(config, made):
        config |= scaling({one.module.path: (one.rank, one.scale) for one in made})
    if experts:
        # How a reader lays out stacked experts depends on the PEFT version that wrote them.
        config["peft_version"] = _WITH_EXPERTS if recipe.experts else adapter.config.get("peft_version")
    return dict(sorted(config.items()))


def _says_something(config: Mapping[str, Any], name: str) -> bool:
    """Return True for a field whose value differs in effect from a missing field.

    An empty list of targets means none; a missing one means PEFT's own choice for the family.
    """
    return bool(config.get(name)) or (name in _PLAIN and config.get(name) is not None)


def module_paths(parameters: Iterable[str]) -> frozenset[str]:
    """Return the paths of all modules on the way to some parameters, containers included.

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
    """Return True when a configuration names ranks that no module has. Engines reserve memory for the largest."""
    ranks = {one.rank for one in made}
    return (
        config["init_lora_weights"] is True and not {config["r"], *config["rank_pattern"].values()} <= ranks
    )


def listed(paths: Sequence[str], base_modules: Collection[str]) -> list[str] | str:
    """Return ``target_modules`` that mean these modules and no others in PEFT: names, or a regex.

    A name is the last part of a path if all modules of the base with that part are targets, otherwise the whole path.

    Example:
        >>> listed(["l.0.q", "l.1.q", "l.0.v"], ["l.0.q", "l.1.q", "l.0.v", "l.1.v"])
        ['l.0.v', 'q']
    """
    own, all_of_base = (Counter(path.rpartition(".")[2] for path in found) for found in (paths, base_modules))
    # A number, such as the index in a list of layers, would match in every list.
    short = {name for name, count in own.items() if all_of_base[name] == count and not name.isdecimal()}
    names = {name if (name := path.rpartition(".")[2]) in short else path for path in paths}
    others = set(base_modules).difference(paths) if set(paths) <= set(base_modules) else ()
    if any(not names.isdisjoint(_endings(other)) for other in others):
        # PEFT takes every module whose path ends in a name, but matches a string against the whole path.
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(names)


def _endings(path: str) -> Iterator[str]:
    """Yield every suffix of a path, whole parts only: the names by which PEFT would match it."""
    while path:
        yield path
        path = path.partition(".")[2]


def scaling(modules: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """Return ``r``, ``lora_alpha`` and the patterns that give each module its rank and its scale, with scale = α/r.

    Example:
        >>> scaling({"l.0.q": (4, 1.0), "l.1.q": (4, 1.0), "l.0.v": (8, 2.0)})["alpha_pattern"]
        {'v': 16}
    """
    ranks = {path: rank for path, (rank, _) in modules.items()}
    alphas = {path: _number(rank * scale) for path, (rank, scale) in modules.items()}
    # The commonest value becomes the default, so the patterns list as few modules as possible.
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": _pattern(ranks, rank),
        "alpha_pattern": _pattern(alphas, alpha),
    }


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return a ``rank_pattern`` or ``alpha_pattern``: an entry for each path whose value is not the default.

    The key is the last part of the path if all modules of that name have the same value, otherwise the whole path.
    """
    by_end: dict[str, set[float]] = {}
    for path, value in values.items():
        by_end.setdefault(path.rpartition(".")[2], set()).add(value)
    table = {}
    for path, value in values.items():
        end = path.rpartition(".")[2]
        if value != default:
            # PEFT matches a pattern at the end of a path, so a whole path needs an anchor at its start.
            table[re.escape(end) if len(by_end[end]) == 1 else f"^{re.escape(path)}"] = value
    return dict(sorted(table.items()))


def _number(value: float) -> float:
    """Return an int where the value is whole: ``16`` reads better in JSON than ``16.0``."""
    return int(value) if float(value).is_integer() else value
