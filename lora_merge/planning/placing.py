"""Where the tensors of the output go, in which dtype, and what that changes in ``config.json``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.codecs import ENCODERS, names_of
from lora_merge.core.checkpoint import Checkpoint, config_levels
from lora_merge.core.shards import OutputFile, place, split
from lora_merge.core.tensor import DTYPE_CODES, TORCH_NAMES, TensorRef, nbytes_of
from lora_merge.quantised import plain_metadata

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from lora_merge.core.weight import Storage, Weight
    from lora_merge.planning.outline import Outline
    from lora_merge.planning.quantising import Targets


Slots = dict[tuple[str, str], TensorRef]
"""``(parameter, role)`` → the tensor as the output stores it; its place is not decided yet."""


def slots_of(
    outline: Outline,
    shapes: Mapping[str, tuple[int, ...]],
    storages: Mapping[str, Storage],
    targets: Targets | None = None,
) -> Slots:
    """Return the tensors that the output stores for each parameter, without a file or an offset.

    Args:
        outline: the output's parameters and their sources.
        shapes: of those that the merge gives another shape.
        storages: how each is stored.
        targets: those that are quantised; None for none.
    """
    slots = {}
    quantised = {} if targets is None else targets.weights
    for name in outline.names:
        source, storage = outline.sources[name], storages[name]
        if name in quantised:
            for role, (part, dtype, size) in quantised[name].parts.items():
                slots[name, role] = TensorRef(part, dtype, size, "", 0, nbytes_of(dtype, size))
            continue
        if storage == source.storage and not storage.is_dense:
            slots.update({(name, role): slot for role, slot in _kept(name, source).items()})
            continue
        shape = shapes.get(name, source.shape)
        names = names_of(name, storage)
        for role, (dtype, size) in ENCODERS[storage.codec].parts(shape, storage).items():
            slots[name, role] = TensorRef(names[role], dtype, size, "", 0, nbytes_of(dtype, size))
    return slots


def _kept(name: str, source: Weight) -> dict[str, TensorRef]:
    """Return the tensors of a weight that stays as it is stored, under the name of its parameter in the output."""
    before, after = source.name.removesuffix(".weight"), name.removesuffix(".weight")
    return {
        role: replace(ref, name=after + ref.name.removeprefix(before), file="", start=0)
        for role, ref in source.parts.items()
    }


def main_dtype(base: Checkpoint) -> str | None:
    """Return the floating dtype (a code) that most bytes of a checkpoint are in; None without plain tensors."""
    sizes: Counter[str] = Counter()
    for weight in base.weights.values():
        if weight.plain is not None:
            sizes[weight.dtype] += weight.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def place_all(
    outline: Outline, slots: Slots, decoded: Collection[str], max_shard_bytes: int | None
) -> tuple[OutputFile, ...]:
    """Return the output's weight files: the base's own, or new shards of ``max_shard_bytes`` at most.

    Args:
        outline: the output's parameters and their sources.
        slots: its tensors.
        decoded: parameters that are stored quantised in the base, and dense in the output.
        max_shard_bytes: of tensors in a file; None for the base's own files.
    """
    parts = {file.name: [part for part in file.parts if part in slots] for file in outline.files}
    if max_shard_bytes is None:
        return tuple(
            place(
                file.name, [slots[part] for part in parts[file.name]], plain_metadata(file.metadata, decoded)
            )
            for file in outline.files
            if parts[file.name]
        )
    # New shards have no counterpart in the base, so all get the metadata of its first file.
    metadata = plain_metadata(outline.files[0].metadata, decoded)
    shards = split([slots[part] for found in parts.values() for part in found], max_shard_bytes)
    return tuple(place(name, shard, metadata) for name, shard in shards)


def dtype_patch(base: Checkpoint, main: str | None, dtype: str | None) -> dict[str, str]:
    """Return what a change of dtype changes in ``config.json``: every level that names the main dtype."""
    if dtype is None or main is None or DTYPE_CODES[dtype] == main:
        return {}
    patch = {
        f"{path}.{key}".lstrip("."): dtype
        for path, level in config_levels(base.config)
        for key in ("dtype", "torch_dtype")
        # A part with its own dtype (a float32 vision tower) keeps it, as its tensors do.
        if key in level and (not path or level[key] == TORCH_NAMES[main])
    }
    # The older of the two names: every release of transformers reads it.
    return patch or {"torch_dtype": dtype}


def decoded_dtype_patch(base: Checkpoint, dtype: str) -> dict[str, str]:
    """Return what ``config.json`` needs to name the dtype of weights that were quantised, as torch spells it."""
    named = {key: base.config[key] for key in ("dtype", "torch_dtype") if key in base.config}
    patch = {key: dtype for key, value in named.items() if value != dtype}
    return patch if named else {"torch_dtype": dtype}
