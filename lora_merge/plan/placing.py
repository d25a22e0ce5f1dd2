"""Where the tensors of the output go, in which dtype, and what that changes in ``config.json``."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import Checkpoint, config_levels
from lora_merge.core.report import Issue, note
from lora_merge.core.shards import OutputFile, place, split
from lora_merge.core.tensor import DTYPE_CODES, TORCH_NAMES, TensorRef, nbytes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.plan.outline import Outline


def slots_of(
    outline: Outline, shapes: Mapping[str, tuple[int, ...]], main: str | None, dtype: str | None
) -> tuple[dict[str, TensorRef], list[Issue]]:
    """Return each tensor as the output stores it, and a note on those that keep their own dtype.

    A change of dtype is for the tensors in the checkpoint's main dtype, the one most of its bytes are in.
    What the base keeps apart on purpose (a float32 ``A_log`` among bfloat16) stays as it is.

    Args:
        outline: the output's names and their sources.
        shapes: of those that the merge gives another shape.
        main: the main dtype's code.
        dtype: the wanted dtype as torch spells it; None keeps the base's, tensor by tensor.
    """
    code = main if dtype is None else DTYPE_CODES[dtype]
    changing = main is not None and code != main
    slots = {}
    apart: Counter[str] = Counter()
    for name in outline.names:
        source = outline.sources[name]
        shape = shapes.get(name, source.shape)
        stored = code if changing and source.dtype == main and code else source.dtype
        slots[name] = TensorRef(name, stored, shape, source.file, source.start, nbytes_of(stored, shape))
        if changing and source.dtype not in (main, code):
            apart[source.dtype] += 1
    issues = [
        note("dtype-kept", "", f"{count} tensors stay {kept}: the base keeps them apart from its {main}")
        for kept, count in apart.items()
        if kept in TORCH_NAMES
    ]
    return slots, issues


def main_dtype(base: Checkpoint) -> str | None:
    """Return the floating dtype that most bytes of a checkpoint are in."""
    sizes: Counter[str] = Counter()
    for ref in base.tensors():
        if ref.dtype in TORCH_NAMES:
            sizes[ref.dtype] += ref.nbytes
    return sizes.most_common(1)[0][0] if sizes else None


def place_all(
    outline: Outline, slots: Mapping[str, TensorRef], max_shard_bytes: int | None
) -> tuple[OutputFile, ...]:
    """Return the output's weight files: the base's own, or shards of at most so many bytes."""
    if max_shard_bytes is None:
        return tuple(
            place(file.name, [slots[name] for name in file.names], file.metadata) for file in outline.files
        )
    metadata = outline.files[0].metadata
    shards = split([slots[name] for name in outline.names], max_shard_bytes)
    return tuple(place(name, shard, metadata) for name, shard in shards)


def dtype_patch(base: Checkpoint, main: str | None, dtype: str | None) -> dict[str, str]:
    """Return what a change of dtype changes in ``config.json``, at every level that names one."""
    if dtype is None or main is None or DTYPE_CODES[dtype] == main:
        return {}
    patch = {
        f"{path}.{key}".lstrip("."): dtype
        for path, level in config_levels(base.config)
        for key in ("dtype", "torch_dtype")
        if key in level and (not path or level[key] == TORCH_NAMES[main])
    }
    return patch or {"torch_dtype": dtype}
