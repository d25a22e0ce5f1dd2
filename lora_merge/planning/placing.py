"""Where the tensors of the output go, in which dtype, and what that changes in ``config.json``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.codecs import ENCODERS
from lora_merge.core.checkpoint import Checkpoint, config_levels
from lora_merge.core.report import Issue, note
from lora_merge.core.shards import OutputFile, place, split
from lora_merge.core.tensor import DTYPE_CODES, TORCH_NAMES, TensorRef, nbytes_of
from lora_merge.core.weight import DENSE, Storage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.planning.outline import Outline


Slots = dict[tuple[str, str], TensorRef]
"""``(parameter, role)`` → the tensor as the output stores it; its place is not decided yet."""


def storages_of(
    outline: Outline, main: str | None, dtype: str | None
) -> tuple[dict[str, Storage], list[Issue]]:
    """Return how the output stores each parameter, and a note on those that keep their own dtype.

    Args:
        outline: the output's parameters and their sources.
        main: code of the main dtype, the one that most bytes of the checkpoint are in.
        dtype: the wanted dtype as torch spells it; None keeps the base's, tensor by tensor.
    """
    code = main if dtype is None else DTYPE_CODES[dtype]
    changing = main is not None and code != main
    storages = {}
    apart: Counter[str] = Counter()
    for name in outline.names:
        source = outline.sources[name]
        # What the base keeps apart on purpose (a float32 A_log among bfloat16) stays as it is.
        is_changed = changing and code and source.storage == Storage(DENSE, main or "")
        storages[name] = Storage(DENSE, code) if is_changed and code else source.storage
        if changing and source.dtype not in (main, code):
            apart[source.dtype] += 1
    issues = [
        note("dtype-kept", "", f"{count} tensors stay {kept}: the base keeps them apart from its {main}")
        for kept, count in apart.items()
        if kept in TORCH_NAMES
    ]
    return storages, issues


def slots_of(
    outline: Outline, shapes: Mapping[str, tuple[int, ...]], storages: Mapping[str, Storage]
) -> Slots:
    """Return the tensors that the output stores for each parameter, without a file or an offset.

    Args:
        outline: the output's parameters and their sources.
        shapes: of those that the merge gives another shape.
        storages: how each is stored.
    """
    slots = {}
    for name in outline.names:
        storage, shape = storages[name], shapes.get(name, outline.sources[name].shape)
        codec = ENCODERS[storage.codec]
        names = codec.names(name, storage)
        for role, (dtype, size) in codec.parts(shape, storage).items():
            slots[name, role] = TensorRef(names[role], dtype, size, "", 0, nbytes_of(dtype, size))
    return slots


def main_dtype(base: Checkpoint) -> str | None:
    """Return the floating dtype (a code) that most bytes of a checkpoint are in; None without plain tensors."""
    sizes: Counter[str] = Counter()
    for weight in base.weights.values():
        if weight.plain is not None:
            sizes[weight.dtype] += weight.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def place_all(outline: Outline, slots: Slots, max_shard_bytes: int | None) -> tuple[OutputFile, ...]:
    """Return the output's weight files: the base's own, or new shards of ``max_shard_bytes`` at most."""
    if max_shard_bytes is None:
        return tuple(
            place(file.name, [slots[part] for part in file.parts], file.metadata) for file in outline.files
        )
    # New shards have no counterpart in the base, so all get the metadata of its first file.
    metadata = outline.files[0].metadata
    shards = split([slots[part] for part in outline.parts], max_shard_bytes)
    return tuple(place(name, shard, metadata) for name, shard in shards)


def dtype_patch(base: Checkpoint, main: str | None, dtype: str | None) -> dict[str, str]:
    """Return what a change of dtype changes in ``config.json``: every level that names the main dtype."""
    if dtype is None or main is None or DTYPE_CODES[dtype] == main:
        return {}
    patch = {
        f"{path}.{key}".lstrip("."): dtype
        for path, level in config_levels(base.config)
        for key in ("dtype", "torch_dtype")
        # A part with a dtype of its own (a float32 vision tower) keeps it, as its tensors do.
        if key in level and (not path or level[key] == TORCH_NAMES[main])
    }
    return patch or {"torch_dtype": dtype}
