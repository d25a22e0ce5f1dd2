"""Which weights of a model are those of linear layers that engines quantise, and what the others are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

from lora_merge.core.checkpoint import INPUT_NAMES, OUTPUT_NAMES
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.modeling.skeleton import may_hold_conv1d
from lora_merge.modeling.towers import TOWER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.planning.joined import Joined

Kind = Literal[
    "linear", "head", "embedding", "router", "tower", "outside", "conv1d", "stack", "unknown", "other"
]
"""What a weight belongs to: ``linear`` is what can be quantised. ``outside``: a linear layer that is in no layer of the model
(a head, a projector); ``stack``: experts in one tensor; ``unknown``: a matrix of a module that transformers does not have."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACK = re.compile(r"(^|\.)experts(\.|$)")

_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg", "switch"})
"""Last parts of the paths of what chooses experts. Its logits decide, and it is small."""

_LINEAR_NAMES = re.compile(
    r"([a-z0-9_]+_proj(_with_mqa)?|qkv_proj|gate_up_proj|w[123oqkv]|wqkv|w_pack|query|key|value|query_key_value|dense"
    r"|dense_h_to_4h|dense_4h_to_h|fc1|fc2|out_proj|o_proj|in_proj_[a-z]+)",
    re.IGNORECASE,
)
"""How linear layers are called in layers, where transformers has no class that could tell."""

_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


class Matrix(NamedTuple):
    """A weight of two axes or more."""

    name: str
    """Of the parameter, in the output."""

    module: str
    """Its module as the checkpoint spells it; of a stack of experts the module that owns it."""

    shape: tuple[int, ...]
    kind: Kind


def matrices_of(joined: Joined) -> list[Matrix]:
    """Return the floating-point weights of an output that have two axes or more, in the order of its files."""
    found = []
    classes = _classes_by_place(joined)
    for name in joined.outline.names:
        shape, source = joined.shape(name), joined.outline.sources[name]
        if len(shape) < 2 or (source.storage.is_dense and source.dtype not in TORCH_NAMES):
            continue
        module, dot, last = name.rpartition(".")
        if last == "weight" and dot:
            found.append(Matrix(name, module, shape, _kind(joined, module, shape, classes)))
        elif len(shape) == 3 and _STACK.search(name):
            found.append(Matrix(name, module, shape, "stack"))
    return found


def _kind(joined: Joined, module: str, shape: tuple[int, ...], classes: dict[str, str]) -> Kind:
    last = module.rpartition(".")[2]
    skeleton = joined.skeleton
    path = joined.stored.module(module)
    if len(shape) != 2:
        return "stack" if len(shape) == 3 and _STACK.search(module) else "other"
    if last in OUTPUT_NAMES or (skeleton is not None and path == skeleton.output_embedding):
        return "head"
    if last in INPUT_NAMES or (skeleton is not None and path == skeleton.input_embedding):
        return "embedding"
    kind = _by_class(joined, module, classes)
    if kind in ("linear", "outside", "unknown"):
        if TOWER.search(module) or TOWER.search(path):
            return "tower"
        if last in _ROUTERS or "router" in module.split("."):
            return "router"
    return kind


def spellings_of(joined: Joined, module: str) -> tuple[str, ...]:
    """Return a module's names: as the checkpoint spells it, then as transformers does where it has another name for it."""
    path = joined.stored.module(module)
    skeleton = joined.skeleton
    # An expert's module may be a part of a stack there, which is no module.
    is_module = path != module and skeleton is not None and path in skeleton.classes
    return (module, path) if is_module else (module,)


def head_of(joined: Joined) -> str:
    """Return the path of the output embedding in the model; empty for a model without one. It may have no tensor, where it is
    tied.
    """
    skeleton = joined.skeleton
    return "lm_head" if skeleton is None else skeleton.output_embedding or ""


def _by_class(joined: Joined, module: str, classes: dict[str, str]) -> Kind:
    """Return what kind of module it is by its class, or that of the same module in another layer."""
    last = module.rpartition(".")[2]
    known = joined.class_of(module) or classes.get(_NUMBER.sub("#", module), "")
    is_inside = _NUMBER.search(f"{module}.") is not None
    if known == "Conv1D" or (not known and last in _CONV1D_NAMES and may_hold_conv1d(joined.base.config)):
        return "conv1d"
    if known == "Embedding":
        return "embedding"
    # In transformers the experts of a layer are one stack, and in most files each is a module.
    is_named = _LINEAR_NAMES.fullmatch(last) is not None and last not in _CONV1D_NAMES
    if not known and is_named and (joined.skeleton is None or _EXPERT.search(module)):
        known = "Linear"
    if known == "Linear":
        return "linear" if is_inside else "outside"
    # A router may be a module of a class of its own.
    return "other" if known and last not in _ROUTERS else "unknown"


def _classes_by_place(joined: Joined) -> dict[str, str]:
    """Return the class of each module by its path without numbers: repeated layers have more numbers than the base."""
    return dict(_numberless(joined)) if joined.skeleton is not None else {}


def _numberless(joined: Joined) -> Iterator[tuple[str, str]]:
    for module in joined.modules:
        known = joined.class_of(module)
        if known:
            yield _NUMBER.sub("#", module), known
