"""Which weights of a model are those of linear layers that engines quantise, and what the others are."""

from __future__ import annotations

import re
from collections.abc import Mapping
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

_COMMON = re.compile(
    r"model\.(layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)|embed_tokens)\.weight|lm_head\.weight"
)
"""The matrices of a common decoder, such as Llama or Qwen3: transformers has these very names, and all but the ends are linear
layers.
"""

_CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


_END: Mapping[str, Kind] = {"embed_tokens": "embedding", "lm_head": "head"}


class Matrix(NamedTuple):
    """A weight of two axes or more."""

    name: str
    """Of the parameter, in the output."""

    module: str
    """Its module as the checkpoint spells it; of a stack of experts the module that owns it."""

    path: str
    """Its module as transformers has it; the same where that has no other name for it."""

    shape: tuple[int, ...]
    kind: Kind

    @property
    def spellings(self) -> tuple[str, ...]:
        """Its module's names, the checkpoint's first."""
        return (self.module,) if self.path == self.module else (self.module, self.path)


def head_of(joined: Joined) -> str:
    """Return the path of the output embedding in the model; empty for a model without one. It may have no tensor, where it is
    tied.
    """
    if _is_common(dict(_owners(joined))):
        return "lm_head"
    skeleton = joined.skeleton
    return "lm_head" if skeleton is None else skeleton.output_embedding or ""


def _is_common(owners: Mapping[str, str]) -> bool:
    """Return True where the names of all matrices say what they are, so that transformers (seconds to import) need not."""
    return all(map(_COMMON.fullmatch, owners))


def matrices_of(joined: Joined) -> list[Matrix]:
    """Return the floating-point weights of an output that have two axes or more, in the order of its files."""
    owners = dict(_owners(joined))
    if _is_common(owners):
        return [
            Matrix(name, module, module, joined.shape(name), _END.get(module.rpartition(".")[2], "linear"))
            for name, module in owners.items()
        ]
    skeleton = joined.skeleton
    classes = {} if skeleton is None else skeleton.classes
    # An expert's module may be a part of a stack in the model, which is not a module.
    paths = {module: joined.stored.module(module) for module in dict.fromkeys(owners.values())}
    paths = {module: path if path in classes else module for module, path in paths.items()}
    # Repeated layers have more numbers than the base.
    by_place = {_NUMBER.sub("#", module): classes[path] for module, path in paths.items() if path in classes}
    found = []
    for name, module in owners.items():
        known = classes.get(paths[module]) or by_place.get(_NUMBER.sub("#", module), "")
        kind = _kind(joined, name, (module, paths[module]), known)
        found.append(Matrix(name, module, paths[module], joined.shape(name), kind))
    return found


def _owners(joined: Joined) -> Iterator[tuple[str, str]]:
    """Yield ``(parameter, module)`` of the weights and of the stacks of experts."""
    for name in joined.outline.names:
        source = joined.outline.sources[name]
        if len(joined.shape(name)) > 1 and (not source.storage.is_dense or source.dtype in TORCH_NAMES):
            module, dot, last = name.rpartition(".")
            is_stack = len(joined.shape(name)) == 3 and _STACK.search(name) is not None
            if dot and (last == "weight" or is_stack):
                yield name, module


def _kind(joined: Joined, name: str, names: tuple[str, str], known: str) -> Kind:
    """Return what a weight belongs to.

    Args:
        joined: what the output is made of.
        name: of the parameter.
        names: of its module, as the checkpoint spells it and as transformers does.
        known: its class, or that of the same module in another layer; empty where there is none.
    """
    module, path = names
    last, shape, skeleton = module.rpartition(".")[2], joined.shape(name), joined.skeleton
    if len(shape) != 2:
        return "stack" if len(shape) == 3 and _STACK.search(name) else "other"
    if last in OUTPUT_NAMES or (skeleton is not None and path == skeleton.output_embedding):
        return "head"
    if last in INPUT_NAMES or known == "Embedding":
        return "embedding"
    if known == "Conv1D" or (not known and last in _CONV1D_NAMES and may_hold_conv1d(joined.base.config)):
        return "conv1d"
    return _of_matrix(names, known, is_model_known=skeleton is not None)


def _of_matrix(names: tuple[str, str], known: str, *, is_model_known: bool) -> Kind:
    """Return what a weight is that may be one of a linear layer."""
    module, path = names
    last = module.rpartition(".")[2]
    if known in ("Linear", "") and (TOWER.search(module) or TOWER.search(path)):
        return "tower"
    if last in _ROUTERS or "router" in module.split("."):
        return "router"
    # In transformers the experts of a layer are one stack, and in most files each is a module.
    is_named = _LINEAR_NAMES.fullmatch(last) is not None and last not in _CONV1D_NAMES
    if known == "Linear" or (not known and is_named and (not is_model_known or _EXPERT.search(module))):
        return "linear" if _NUMBER.search(f"{module}.") else "outside"
    return "other" if known else "unknown"
