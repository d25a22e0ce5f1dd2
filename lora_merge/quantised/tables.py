"""Where a configuration says how weights are quantised, and which method it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lora_merge.core.checkpoint import config_levels

KEYS = ("quantization_config", "compression_config", "quantization")
"""Of ``config.json``, at any level: of most methods, of old compressed-tensors, of MLX."""

HF_QUANT = "hf_quant_config.json"
QUANTIZE = "quantize_config.json"
QUANT = "quant_config.json"

SIDE_FILES = (HF_QUANT, QUANTIZE, QUANT)
"""Files beside ``config.json`` that say it too: of ModelOpt, of GPTQ, of old AWQ."""

INNER = ("quantization", "quantization_config")
"""Keys inside a table that have the settings themselves: of ModelOpt, of old compressed-tensors."""

QUANT_STATE = "quant_state"
"""Place of what bitsandbytes says beside each weight, among the settings that are found."""

_ALIASES = {
    "sparseml": "compressed-tensors",
    "compressed_tensors": "compressed-tensors",
    "fbgemm": "fbgemm_fp8",
    "gptqmodel": "gptq",
    "finegrained_fp8": "fp8",
}


class Table(NamedTuple):
    """One table of settings."""

    place: str
    """Dotted key in ``config.json``, or the name of a side file."""

    method: str
    """``quant_method`` in lower case, or what the place and the keys show; empty if neither does."""

    values: Mapping[str, Any]
    """Its settings, without the tables around them."""


def settings_of(
    config: Mapping[str, Any], side: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Return what says how weights are quantised, as it is written: place → table. Empty tables say nothing.

    Example:
        >>> list(settings_of({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, {}))
        ['text_config.quantization_config']
    """
    found = {place: table for place, table in _in_config(config) if isinstance(table, dict) and table}
    return found | {name: side[name] for name in SIDE_FILES if side.get(name)}


def tables_of(settings: Mapping[str, Mapping[str, Any]]) -> tuple[Table, ...]:
    """Return the tables of some settings, each with the method that it names."""
    return tuple(
        Table(place, _method(place, table), _inner(table))
        for place, table in settings.items()
        if place != QUANT_STATE
    )


def table_of(settings: Mapping[str, Mapping[str, Any]], *methods: str) -> Table | None:
    """Return the first table that names one of these methods, with what only later ones say added to it."""
    mine = [table for table in tables_of(settings) if table.method in methods]
    if not mine:
        return None
    values: dict[str, Any] = {}
    for table in mine:
        # A null says nothing that a later table could not say.
        values |= {key: value for key, value in table.values.items() if values.get(key) is None}
    return mine[0]._replace(values=values)


def keys_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the dotted keys of a ``config.json`` that say how weights are quantised, empty tables among them."""
    return tuple(place for place, _ in _in_config(config))


def _in_config(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, level in config_levels(config):
        # The tables themselves look like levels, since their names end in _config.
        if not set(KEYS) & set(path.split(".")):
            yield from ((f"{path}.{key}".lstrip("."), level[key]) for key in KEYS if key in level)


def _inner(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings themselves: ModelOpt and old compressed-tensors have them one level down."""
    for key in INNER:
        if isinstance(table.get(key), dict):
            outer = {name: value for name, value in table.items() if name != key}
            return {**outer, **table[key]}
    return table


def _method(place: str, table: Mapping[str, Any]) -> str:
    inner = _inner(table)
    named = inner.get("quant_method") or table.get("quant_method")
    if isinstance(named, str) and named:
        name = named.lower()
        return "modelopt" if name.startswith("modelopt") else _ALIASES.get(name, name)
    # ModelOpt has groups in its table too, beside the name of its algorithm.
    if "config_groups" in inner and "quant_algo" not in inner:
        return "compressed-tensors"
    if place == HF_QUANT or "quant_algo" in inner:
        return "modelopt"
    if place == QUANTIZE:
        return "gptq"
    if place == QUANT:
        # AutoAWQ's old file names no method, but has these keys.
        return "awq" if "w_bit" in inner or "version" in inner else "gptq"
    return "mlx" if "group_size" in inner and "bits" in inner else ""
