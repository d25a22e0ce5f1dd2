"""The output before anything is merged: its tensors, the files that they are in, and the source of each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import config_levels
from lora_merge.core.weight import WEIGHT, Weight
from lora_merge.modeling.skeleton import derived_lists
from lora_merge.peft_rules.patterns import TargetError
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.tensor import TensorRef

_MOST_LAYERS = 4096
"""The most layers that a model may have once its layers are repeated."""

_LAYER = re.compile(r"(?P<stem>(?:.*?\.)?(?:layers|layer|h|blocks))\.(?P<index>\d+)\.(?P<rest>.+)")
"""A parameter of one of a model's layers. The stem is lazy, so that it ends at the outermost list (not at experts)."""


_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types")
"""Lists with one entry per layer (transformers 5.23)."""

_BY_NUMBER = frozenset({"mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "global_attn_idx"})
"""Lists of the numbers of some layers (transformers 5.23)."""


@dataclass(frozen=True)
class OutlineFile:
    """One weight file of the output, by what it holds."""

    name: str
    metadata: Mapping[str, str]
    parts: tuple[tuple[str, str], ...]
    """``(parameter, role)`` of each tensor, in the order of their bytes."""


@dataclass(frozen=True)
class Outline:
    """Parameters of the output and the stored weights behind them; at first, the base's own."""

    files: tuple[OutlineFile, ...]

    sources: Mapping[str, Weight]
    """Name in the output → stored weight, which may have another name."""

    @classmethod
    def of(cls, base: Checkpoint) -> Outline:
        """Return the outline of a base as it is stored."""
        sources = base.parameters()
        owners = {ref.name: (name, role) for name, one in sources.items() for role, ref in one.parts.items()}
        files = tuple(
            OutlineFile(file.name, file.metadata, tuple(owners[ref.name] for ref in file.tensors))
            for file in base.files
        )
        return cls(files, sources)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every parameter, in the order of the files' bytes."""
        return tuple(dict.fromkeys(name for name, _ in self.parts))

    @cached_property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """``(parameter, role)`` of every tensor, in the order of the files' bytes."""
        return tuple(part for file in self.files for part in file.parts)

    def with_twin(self, name: str, twin: str) -> Outline:
        """Return the outline with a second parameter of the same source, its tensors right after those of the first."""
        copies = {name: (name, twin)}
        files = tuple(
            replace(file, parts=tuple(_copied(file.parts, lambda one: copies.get(one, (one,)))))
            for file in self.files
        )
        return Outline(files, {**self.sources, twin: self.sources[name]})

    def without(self, names: Collection[str]) -> Outline:
        """Return the outline without some parameters; a file that becomes empty is dropped."""
        files = (
            replace(file, parts=tuple(part for part in file.parts if part[0] not in names))
            for file in self.files
        )
        sources = {name: ref for name, ref in self.sources.items() if name not in names}
        return Outline(tuple(file for file in files if file.parts), sources)

    def with_new(self, tensors: Mapping[str, TensorRef]) -> Outline:
        """Return the outline with more parameters at the end of its last file."""
        last = self.files[-1]
        new = {name: Weight.dense(ref) for name, ref in tensors.items()}
        parts = ((name, role) for name, weight in new.items() for role in weight.parts)
        files = (*self.files[:-1], replace(last, parts=(*last.parts, *parts)))
        return Outline(files, {**self.sources, **new})

    def stored_as(self, roles: Mapping[str, Sequence[str]]) -> Outline:
        """Return the outline with other parts of some parameters, where the first of theirs is: parameter → roles."""
        files = []
        for file in self.files:
            parts: list[tuple[str, str]] = []
            for name, role in file.parts:
                if name not in roles:
                    parts.append((name, role))
                elif role == WEIGHT:
                    parts += [(name, new) for new in roles[name]]
            files.append(replace(file, parts=tuple(parts)))
        return Outline(tuple(files), self.sources)

    def renamed(self, names: Mapping[str, str]) -> Outline:
        """Return the outline with other names for some parameters: old → new."""
        files = tuple(
            replace(file, parts=tuple((names.get(name, name), role) for name, role in file.parts))
            for file in self.files
        )
        return Outline(files, {names.get(name, name): ref for name, ref in self.sources.items()})


def replicated(outline: Outline, layers: tuple[int, ...]) -> Outline:
    """Return the outline of a model whose layer j is layer ``layers[j]`` of this one.

    Reference:
        ``peft.tuners.tuners_utils.replicate_layers`` (PEFT 0.21.2).
    """
    sources: dict[str, Weight] = {}
    copies: dict[str, list[str]] = {}
    stem = layer_stem(outline)
    for name in outline.names:
        # Lists of other towers keep their layers.
        match = _LAYER.fullmatch(name)
        if match is None or match["stem"] != stem:
            copies[name] = [name]
        else:
            copies[name] = [
                f"{stem}.{new}.{match['rest']}"
                for new, old in enumerate(layers)
                if old == int(match["index"])
            ]
        sources |= dict.fromkeys(copies[name], outline.sources[name])
    files = tuple(
        replace(file, parts=tuple(_copied(file.parts, lambda one: copies[one]))) for file in outline.files
    )
    return Outline(tuple(file for file in files if file.parts), sources)


def layer_stem(outline: Outline) -> str:
    """Return the path of the list of layers (``"model.layers"``); empty where there are several, or none."""
    stems: dict[str, set[str]] = {}
    for name in outline.names:
        match = _LAYER.fullmatch(name)
        if match:
            stems.setdefault(match["stem"], set()).add(match["index"])
    return next(iter(stems)) if len(stems) == 1 else ""


def layer_order(config: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """Return for each layer of a replicated model the layer that it is a copy of; empty without
    ``layer_replication``.

    Example:
        >>> layer_order({"layer_replication": [[0, 3], [1, 4]]}, 4)
        (0, 1, 2, 1, 2, 3)

    Raises:
        TargetError: a range is outside of the model's layers.
    """
    ranges = config.get("layer_replication")
    if not ranges:
        return ()
    if not isinstance(ranges, list) or not all(_is_range(pair) for pair in ranges):
        raise TargetError("layer_replication", f"is {quoted(ranges)}, expected a list of [start, end]")
    # PEFT goes through each range, and an empty one adds nothing.
    pairs = [(start, end) for start, end in ranges if start < end]
    if not pairs or any(start < 0 or end > n_layers for start, end in pairs):
        raise TargetError("layer_replication", f"is {quoted(ranges)}, and the base has {n_layers} layers")
    n_made = sum(end - start for start, end in pairs)
    if n_made > _MOST_LAYERS:
        sentence = f"would make {n_made} layers, expected at most {_MOST_LAYERS}"
        raise TargetError("layer_replication", sentence)
    return tuple(layer for start, end in pairs for layer in range(start, end))


def _is_range(pair: object) -> bool:
    """Return True for a list of two whole numbers."""
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(isinstance(end, int) and not isinstance(end, bool) for end in pair)
    )


def replication_patch(config: Mapping[str, Any], layers: tuple[int, ...], n_layers: int) -> dict[str, Any]:
    """Return what a change of layers changes in ``config.json``: their number, and lists with an entry per layer."""
    patch: dict[str, Any] = {}
    for path, level in config_levels(config):
        keys = [key for key in ("num_hidden_layers", "n_layer", "num_layers") if level.get(key) == n_layers]
        # A level with another number of layers is of another part of the model (a vision tower).
        if not keys:
            continue
        changes: dict[str, Any] = dict.fromkeys(keys, len(layers))
        # A list that transformers derives from other fields would no longer fit, so it is written out.
        derived = derived_lists(level, _PER_LAYER)
        changes |= {
            key: [value[layer] for layer in layers]
            for key, value in derived.items()
            if len(value) == n_layers
        }
        changes |= {
            key: [new for new, old in enumerate(layers) if old in value]
            for key, value in level.items()
            if key in _BY_NUMBER and isinstance(value, list)
        }
        patch |= {f"{path}.{key}".lstrip("."): value for key, value in changes.items()}
    return patch


def _copied(
    parts: Iterable[tuple[str, str]], copies: Callable[[str], Sequence[str]]
) -> Iterator[tuple[str, str]]:
    """Yield each part once for each parameter that is made from its own."""
    return ((copy, role) for name, role in parts for copy in copies(name))
