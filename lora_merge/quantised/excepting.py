"""Modules that become dense among quantised ones: how the configuration says so."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_merge.core.checkpoint import INPUT_NAMES, owner_name
from lora_merge.quantised.modelopt import LAYERS, LISTS
from lora_merge.quantised.tables import HF_QUANT, INNER, QUANTIZE, tables_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from lora_merge.core.weight import Weight

_HEAD = "lm_head"

_FUSED: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"),),
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "fused_qkv_a_proj": (("q_a_proj", "kv_a_proj_with_mqa"),),
    "in_proj_qkvz": (("in_proj_qkv", "in_proj_z"),),
    "in_proj_ba": (("in_proj_b", "in_proj_a"),),
}
"""Name of a layer that vLLM or SGLang makes of several modules → the modules. Some methods ask about that name alone."""

_EXPERT = re.compile(r"(.*\bexperts)\.\d+\..*")


class _Dense(NamedTuple):
    """What has to be named."""

    modules: tuple[str, ...]
    """Paths of modules; the stack's path for its parameters."""

    stacks: tuple[str, ...]
    """Paths of stacks of experts where no expert stays quantised."""

    fused: tuple[str, ...]
    """Names under which engines ask about several of the modules at once."""

    heads: tuple[str, ...]
    """What is dense already, and was so by the library's own default where there was no list."""


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
    dense = _dense(modules, weights)
    found: dict[str, Mapping[str, Any]] = {}
    for table in tables_of(settings):
        edit = _EDITS.get(table.method)
        if edit is not None and modules:
            raw = settings[table.place]
            key = next((key for key in INNER if isinstance(raw.get(key), dict)), None)
            inner = raw if key is None else raw[key]
            changed = edit(inner, table.place, dense)
            found[table.place] = changed if key is None else {**raw, key: changed}
    return found


def plain_metadata(metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the ``__metadata__`` of a header where some weights are dense from now on: torchao keeps their classes there.

    Args:
        metadata: of the source.
        names: of the weights.

    Example:
        >>> plain_metadata({"format": "pt", "a.weight": '{"_type": "Int8Tensor"}'}, ["a.weight", "b.weight"])
        {'format': 'pt', 'a.weight': '{"_type": "Tensor"}'}
    """
    return dict(metadata) | {name: '{"_type": "Tensor"}' for name in names if name in metadata}


def _dense(modules: Collection[str], weights: Mapping[str, Weight]) -> _Dense:
    # A parameter without a separate module is named by the module that has it.
    named = dict.fromkeys(
        module if f"{module}.weight" in weights else module.rpartition(".")[0] or module for module in modules
    )
    chosen = set(named)
    quantised = {
        name.removesuffix(".weight") for name, weight in weights.items() if not weight.storage.is_dense
    }
    kept = {match[1] for module in quantised - set(modules) for match in [_EXPERT.fullmatch(module)] if match}
    stacks = dict.fromkeys(match[1] for module in named for match in [_EXPERT.fullmatch(module)] if match)
    return _Dense(
        tuple(named),
        tuple(stack for stack in stacks if stack not in kept),
        tuple(dict.fromkeys(_fused(named, chosen))),
        tuple(dict.fromkeys(_heads(weights, quantised))),
    )


def _fused(modules: Iterable[str], chosen: set[str]) -> Iterator[str]:
    for module in modules:
        parent, dot, last = module.rpartition(".")
        for name, groups in _FUSED.items():
            for mates in groups:
                if last in mates and all(f"{parent}{dot}{mate}" in chosen for mate in mates):
                    yield f"{parent}{dot}{name}"


def _heads(weights: Mapping[str, Weight], quantised: set[str]) -> Iterator[str]:
    """Yield the modules that transformers leaves dense where it is given no list: output embeddings, tied or not, and the last
    module. Whatever dense matrix is in no layer is named, for it is dense as it is.
    """
    # A head that is quantised further down would be excepted by this name too.
    if not any(module.rpartition(".")[2] == _HEAD for module in quantised):
        yield _HEAD
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module == name or len(weight.shape) != 2 or not weight.storage.is_dense:
            continue
        if owner_name(name) not in INPUT_NAMES and not any(map(str.isdigit, module.split("."))):
            yield module


def _listed(old: object, new: Iterable[str]) -> list[Any]:
    """Return a list of exceptions with more of them."""
    listed = list(old) if isinstance(old, list | tuple) else []
    known = {one for one in listed if isinstance(one, str)}
    return listed + [one for one in dict.fromkeys(new) if one not in known]


def _names(values: Mapping[str, Any], keys: tuple[str, ...], dense: _Dense, *, fused: bool) -> dict[str, Any]:
    """Return a table whose list of modules has more of them: the one that is there, else the first."""
    used = [key for key in keys if values.get(key)] or [next((key for key in keys if key in values), keys[0])]
    new = [*dense.modules, *dense.stacks, *(dense.fused if fused else ())]
    # A list that is null or missing has the library's defaults, and one that is there has none.
    return dict(values) | {
        key: _listed(values.get(key), new if values.get(key) else [*dense.heads, *new]) for key in used
    }


def _fp8(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    del place
    # vLLM splits a fused name before it looks here, and takes names whole (`is_layer_skipped`).
    return _names(values, ("modules_to_not_convert", "ignored_layers"), dense, fused=False)


def _plain_list(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    del place
    return _names(values, ("modules_to_not_convert",), dense, fused=True)


def _bitsandbytes(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    del place
    return _names(values, ("llm_int8_skip_modules",), dense, fused=True)


def _compressed(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    del place
    return dict(values) | {"ignore": _listed(values.get("ignore"), dense.modules)}


def _gptq(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    del place
    # Escaped and with both ends: else ``layers.1`` would be found in ``layers.10``. The first rule that matches counts.
    names = (*dense.modules, *dense.stacks, *dense.fused)
    rules: dict[str, Any] = {f"-:^{_escaped(name)}$": {} for name in names}
    old = values.get("dynamic")
    rules |= {rule: table for rule, table in (old or {}).items() if rule not in rules}
    found = dict(values) | {"dynamic": rules}
    if values.get("lm_head") and any(module.rpartition(".")[2] == _HEAD for module in dense.modules):
        found["lm_head"] = False
    return found


def _escaped(name: str) -> str:
    # A hyphen means nothing outside of brackets, and an escaped one is hard to read.
    return re.escape(name).replace("\\-", "-")


def _awq(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    found = _plain_list(values, place, dense)
    # GPTQModel, whose file this is, asks its own rules.
    return _gptq(found, place, dense) if place == QUANTIZE else found


def _modelopt(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    # Without a list, the name that ModelOpt gives it in this file.
    key = next((key for key in LISTS if key in values), LISTS[place == HF_QUANT])
    found = dict(values) | {key: _listed(values.get(key), (*dense.modules, *dense.stacks))}
    layers = values.get(LAYERS)
    if isinstance(layers, dict):
        gone = set(dense.modules)
        found[LAYERS] = {name: table for name, table in layers.items() if name not in gone}
    return found


def _mlx(values: Mapping[str, Any], place: str, dense: _Dense) -> dict[str, Any]:
    del place
    return dict(values) | dict.fromkeys(dense.modules, False)


_EDITS: dict[str, Callable[[Mapping[str, Any], str, _Dense], dict[str, Any]]] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm_fp8": _plain_list,
    "compressed-tensors": _compressed,
    "modelopt": _modelopt,
    "mxfp4": _plain_list,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "torchao": _plain_list,
    "mlx": _mlx,
}
"""Method → what makes the new table of an old one."""
