"""Weights that engines load as one: all of them are stored in the same way, or none can be loaded."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

_FUSED = (
    {"q_proj", "k_proj", "v_proj"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
    {"wq", "wk", "wv"},
    {"query", "key", "value"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"in_proj_qkv", "in_proj_z"},
    {"in_proj_qkvz", "in_proj_ba"},
    {"in_proj_b", "in_proj_a"},
    {"wk", "weights_proj"},
)
"""Last parts of the paths of modules that engines fuse (``packed_modules_mapping`` and ``stacked_params_mapping`` of the models
in vLLM 0.32)."""

_EXPERTS = re.compile(r"(?P<layer>(?:.*\.)?experts)\.")
"""One layer of experts: its matrices are one kernel, with one way to store them."""


def with_mates(touched: Iterable[str], names: Collection[str]) -> frozenset[str]:
    """Return parameters together with those that engines fuse them with.

    Args:
        touched: names of parameters.
        names: those that can be mates: of the same model, stored quantised.

    Example:
        >>> sorted(with_mates(["l.0.q_proj.weight"], ["l.0.q_proj.weight", "l.0.k_proj.weight", "l.1.k_proj.weight"]))
        ['l.0.k_proj.weight', 'l.0.q_proj.weight']
    """
    return _closed(touched, _grouped(names, _keys), _keys)


def fused_with(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return for each parameter the others that are one matrix with it in an engine, so that they have one scale where a
    scale is for the whole matrix. An expert has its own matrix.

    Args:
        names: of parameters.

    Example:
        >>> fused_with(["l.0.q_proj.weight", "l.0.k_proj.weight", "l.0.o_proj.weight"])["l.0.q_proj.weight"]
        ('l.0.k_proj.weight',)
    """
    groups = _grouped(names, _fused_keys)
    return {name: tuple(sorted(_closed([name], groups, _fused_keys) - {name})) for name in names}


_Key = tuple[str, str]


def _grouped(names: Iterable[str], keys: Callable[[str], list[_Key]]) -> Mapping[_Key, set[str]]:
    groups: dict[_Key, set[str]] = defaultdict(set)
    for name in names:
        for key in keys(name):
            groups[key].add(name)
    return groups


def _closed(
    names: Iterable[str], groups: Mapping[_Key, set[str]], keys: Callable[[str], list[_Key]]
) -> frozenset[str]:
    """Return parameters with all that share a group with them."""
    found = set(names)
    left = list(found)
    seen: set[_Key] = set()
    # A mate may have other mates: wk is fused with wq and wv in one family, with weights_proj in another.
    while left:
        # A layer of experts has hundreds of members, each of which has its key.
        fresh = set(keys(left.pop())) - seen
        seen |= fresh
        new = {name for key in fresh for name in groups.get(key, ())} - found
        found |= new
        left += new
    return frozenset(found)


def _keys(name: str) -> list[_Key]:
    """Return the groups that a parameter is in: the path that its members share, and which group it is."""
    layer = _EXPERTS.match(name)
    if layer is not None:
        return [(layer["layer"], "experts")]
    return _fused_keys(name)


def _fused_keys(name: str) -> list[_Key]:
    module, _, _ = name.rpartition(".")
    path, _, last = module.rpartition(".")
    return [(path, str(n)) for n, names in enumerate(_FUSED) if last in names]
