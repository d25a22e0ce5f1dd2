"""Where every output byte goes: sizes → shards, offsets, header bytes and the index. Pure functions.

The layout of a safetensors file: eight bytes of little-endian header length N, N bytes of JSON padded
with spaces to a multiple of eight, then the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import SAFETENSORS_FILE
from lora_merge.core.tensor import TensorRef, nbytes_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

HEADER_PREFIX_BYTES, _ALIGNMENT = 8, 8
_FORMAT = {"format": "pt"}  # transformers refuses a file without it


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file of the output, fixed before a byte is written."""

    name: str
    nbytes: int
    """Of the whole file, header included."""

    header: str
    """The JSON text, padded; `header_bytes` adds the length before it."""

    slots: tuple[TensorRef, ...]
    """In the order of their bytes; contiguous from the end of the header to the end of the file."""


def place(name: str, refs: Sequence[TensorRef], metadata: Mapping[str, str]) -> OutputFile:
    """Return the file that holds these tensors, in this order, with a place for each.

    Args:
        name: of the file, inside the output directory.
        refs: name, dtype and shape are used; file and place are the sources' and are replaced.
        metadata: the header's ``__metadata__``; ``format: pt`` is added when missing.
    """
    # Two passes: a header counts offsets from the end of the header, whose length is known only when it is written.
    table: dict[str, object] = {"__metadata__": {**_FORMAT, **metadata}}
    offset = 0
    sizes = [nbytes_of(ref.dtype, ref.shape) for ref in refs]
    for ref, nbytes in zip(refs, sizes, strict=True):
        table[ref.name] = {
            "dtype": ref.dtype,
            "shape": list(ref.shape),
            "data_offsets": [offset, offset + nbytes],
        }
        offset += nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    # Counted in bytes: a name may take more of them than it has characters.
    text += " " * (-len(text.encode()) % _ALIGNMENT)
    start = HEADER_PREFIX_BYTES + len(text.encode())
    slots = []
    for ref, nbytes in zip(refs, sizes, strict=True):
        slots.append(TensorRef(ref.name, ref.dtype, ref.shape, name, start, nbytes))
        start += nbytes
    return OutputFile(name=name, nbytes=start, header=text, slots=tuple(slots))


def header_bytes(file: OutputFile) -> bytes:
    """Return the bytes before the first tensor: the length of the JSON, eight bytes little-endian, then the JSON."""
    text = file.header.encode()
    return len(text).to_bytes(HEADER_PREFIX_BYTES, "little") + text


def split(refs: Iterable[TensorRef], max_shard_bytes: int) -> list[tuple[str, list[TensorRef]]]:
    """Return ``(file name, tensors)`` with at most so many bytes of tensors in each file.

    Greedy and in order: a tensor that does not fit opens the next shard, and one larger than the limit
    has a shard to itself. With a limit of 10, sizes 6, 6, 2, 6, 12, 2 fall into 6 | 6 2 | 6 | 12 | 2.

    Reference:
        ``huggingface_hub.split_state_dict_into_shards_factory``, whose rule it follows but for one thing:
        tensors keep their order, where the Hub's function files large ones separately.
    """
    shards: list[list[TensorRef]] = []
    room = 0
    for ref in refs:
        nbytes = nbytes_of(ref.dtype, ref.shape)
        if not shards or nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(ref)
        room -= nbytes
    n_shards = len(shards)
    if n_shards <= 1:
        # One file needs no index, and transformers looks for it under this name.
        return [(SAFETENSORS_FILE, shard) for shard in shards]
    return [(shard_name(n, n_shards), shard) for n, shard in enumerate(shards, 1)]


def shard_name(n: int, n_shards: int) -> str:
    """Return what transformers calls a shard; the first is number 1.

    Example:
        >>> shard_name(1, 2)
        'model-00001-of-00002.safetensors'
    """
    return f"model-{n:05}-of-{n_shards:05}.safetensors"


def index_text(files: Sequence[OutputFile], metadata: Mapping[str, object]) -> str:
    """Return the text of ``model.safetensors.index.json``.

    ``total_size`` is the true number of bytes of the tensors; other metadata stays.
    """
    total = sum(slot.nbytes for file in files for slot in file.slots)
    weight_map = {slot.name: file.name for file in files for slot in file.slots}
    index = {"metadata": {**metadata, "total_size": total}, "weight_map": weight_map}
    # The form that ``save_pretrained`` of transformers writes.
    return json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
