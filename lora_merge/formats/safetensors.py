"""The safetensors format on disk: headers, and tensors by their place in the file."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import WeightFile
from lora_merge.core.shards import HEADER_PREFIX_BYTES
from lora_merge.core.tensor import (
    DTYPE_BITS,
    MAX_DIMENSIONS,
    MAX_NAME_CHARACTERS,
    STORED_TYPES,
    TORCH_NAMES,
    TORCH_TYPES,
    TensorRef,
    nbytes_of,
)
from lora_merge.errors import CheckpointError
from lora_merge.native.library import library
from lora_merge.runtime.host_floats import host_floats
from lora_merge.storage.digests import digest_text, new_digest
from lora_merge.storage.instead import instead_of
from lora_merge.storage.json_values import OddValueError
from lora_merge.storage.reading import read_blocks, read_into
from lora_merge.storage.small_files import parse_json
from lora_merge.storage.sources import open_source
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy as np
    import torch

    from lora_merge.modeling.pieces import Box
    from lora_merge.storage.sources import Source

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit (safetensors 0.8, ``MAX_HEADER_SIZE``)."""

_COMPARED_ELEMENTS = 1 << 20

_REFETCH = "download the file again: it is truncated, or is not a safetensors file"


def read_header(path: str | Path, name: str | None = None) -> WeightFile:
    """Return the index of a safetensors file, checked against the file's size.

    Args:
        path: the file, or what names it in another storage.
        name: what to call it in the result; default: its path.

    Raises:
        CheckpointError: it is not a safetensors file, or tensors overlap, leave holes or are outside it.
    """
    label = str(path)
    with open_source(path) as source:
        try:
            table, data_start = _header_table(source)
        except CheckpointError as exc:
            # Asked only after an error: a pointer or a web page explains it better than a header that makes
            # no sense.
            what = instead_of(path)
            if what is None:
                raise
            raise CheckpointError(label, "", what.sentence, hint=what.hint) from exc
    metadata = table.pop("__metadata__", None)
    if metadata is None:  # MLX writes null
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(label, "__metadata__", f"is {quoted(metadata)}", "a table of strings")
    refs = [_parse_row(row_name, row, label, data_start) for row_name, row in table.items()]
    # By place; empty tensors share their start with the next one, and come first.
    refs.sort(key=lambda ref: (ref.start, ref.end))
    _check_cover(refs, data_start, source.nbytes, label)
    return WeightFile(name=name or label, metadata=metadata, tensors=tuple(refs))


def _header_table(source: Source) -> tuple[dict[str, Any], int]:
    """Return the header's JSON table, and the byte where the data begins."""
    label, size = source.text, source.nbytes
    # The file begins with the header's length, 8 bytes little-endian.
    if size < HEADER_PREFIX_BYTES:
        raise CheckpointError(label, "", f"has {size} bytes", "at least 8", hint=_REFETCH)
    prefix = bytearray(HEADER_PREFIX_BYTES)
    read_into(source, memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    # The length is untrusted: it is checked before a buffer of that size is made.
    most = min(MAX_HEADER_BYTES, size - HEADER_PREFIX_BYTES)
    if length > most:
        raise CheckpointError(label, "header", f"claims {length} bytes", f"at most {most}", hint=_REFETCH)
    text = bytearray(length)
    read_into(source, memoryview(text), HEADER_PREFIX_BYTES)
    try:
        table = parse_json(bytes(text))
    except OddValueError as exc:
        raise CheckpointError(label, f"header: {exc.subject}", exc.got, exc.wanted) from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(label, "header", f"is not valid JSON ({exc})", hint=_REFETCH) from exc
    if not isinstance(table, dict):
        raise CheckpointError(label, "header", f"is a JSON {type(table).__name__}", "a table of tensors")
    return table, HEADER_PREFIX_BYTES + length


def _parse_row(name: str, row: object, label: str, data_start: int) -> TensorRef:
    """Return the tensor of one header row.

    Raises:
        CheckpointError: the row is malformed, or its size is not that of its shape and dtype.
    """
    # A name with a million parts would keep every later step busy.
    if len(name) > MAX_NAME_CHARACTERS:
        got, wanted = f"has a name of {len(name)} characters", f"at most {MAX_NAME_CHARACTERS}"
        raise CheckpointError(label, f"{name[:100]}…", got, wanted)
    try:
        dtype, sizes, (begin, end) = row["dtype"], row["shape"], row["data_offsets"]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        dtype, sizes, begin, end = None, None, None, None
    # `type(…) is int`, not isinstance: JSON's true is an int in Python.
    if not (type(dtype) is str and type(sizes) is list and type(begin) is int and type(end) is int):
        raise CheckpointError(
            label, name, f"has the header row {quoted(row)}", "dtype, shape and data_offsets"
        )
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            label, name, f"has the dtype {quoted(dtype)}", f"one of {', '.join(DTYPE_BITS)}"
        )
    if len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise CheckpointError(label, name, f"has the shape {quoted(sizes)}", "a list of sizes")
    # Python's integers do not overflow: a shape whose size exceeds 64 bits differs from the claimed span.
    nbytes = nbytes_of(dtype, tuple(sizes))
    if begin < 0 or end - begin != nbytes:
        raise CheckpointError(
            label, name, f"spans bytes {begin} to {end}", f"{nbytes} bytes for {dtype} {sizes}"
        )
    return TensorRef(name, dtype, tuple(sizes), label, data_start + begin, nbytes)


def _check_cover(refs: list[TensorRef], data_start: int, size: int, label: str) -> None:
    """Check that the tensors follow each other without a gap, from the header to the end of the file.

    Raises:
        CheckpointError: they overlap, leave a hole, or the file is shorter or longer.
    """
    expected = data_start
    for ref in refs:
        if ref.start != expected:
            what = "overlaps the tensor before it" if ref.start < expected else "leaves a gap before it"
            raise CheckpointError(
                label, ref.name, f"{what}, starting at byte {ref.start}", f"byte {expected}"
            )
        expected = ref.end
    # Also zeros at the end are an error: the format allows nothing there.
    if expected != size:
        hint = "download the file again: it is truncated, or was extended"
        raise CheckpointError(
            label, "", f"has {size} bytes", f"{expected} according to its header", hint=hint
        )


def blocks(ref: TensorRef) -> Iterator[memoryview]:
    """Yield a tensor's bytes in order, block by block, through one reused buffer.

    Raises:
        CheckpointError: the file ends too soon.
    """
    with open_source(ref.file) as source:
        yield from read_blocks(source, ref.start, ref.nbytes)


def tensor_digest(ref: TensorRef) -> str:
    """Return the XXH3 digest of a tensor's stored bytes.

    Raises:
        CheckpointError: the file ends too soon.
    """
    digest = new_digest()
    for block in blocks(ref):
        digest.update(block)
    return digest_text(digest)


_NOT_FINITE = {
    "BF16": 0x7F80,
    "F16": 0x7C00,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
    "F8_E8M0": 0xFF,
}
"""Dtype → its bits, as a number without the sign, of the first that is infinite or NaN; all above are so too."""


def is_finite(ref: TensorRef, numbers: str = "") -> bool:
    """Return True when no value of a floating-point tensor is NaN or infinite.

    Args:
        ref: the tensor.
        numbers: what its bytes are, where its dtype does not say it.

    Raises:
        CheckpointError: the file ends too soon.
    """
    return all(are_finite(block, numbers or ref.dtype) for block in blocks(ref))


def are_finite(content: memoryview, dtype: str) -> bool:
    """Return True when no value in some bytes of a floating-point dtype is NaN or infinite."""
    import numpy as np

    width = DTYPE_BITS[dtype]
    # E8M0 has no sign.
    magnitude = (1 << width) - 1 if dtype == "F8_E8M0" else (1 << (width - 1)) - 1
    values = np.frombuffer(content, f"<u{width // 8}")
    space = np.empty(min(len(values), _FINITE_BYTES * 8 // width), values.dtype)
    # In parts that stay in the processor's cache. Whole numbers are compared four times as fast as floats.
    for start in range(0, len(values), len(space) or 1):
        part = values[start : start + len(space)]
        if np.bitwise_and(part, magnitude, out=space[: len(part)]).max() >= _NOT_FINITE[dtype]:
            return False
    return True


_FINITE_BYTES = 1 << 18
"""Bytes that are looked at at once."""


def is_zero(ref: TensorRef) -> bool:
    """Return True when every value of a floating-point tensor is zero. Reading stops at the first block with another
    value.

    Raises:
        CheckpointError: the file ends too soon.
    """
    import numpy as np

    width = DTYPE_BITS[ref.dtype]
    magnitude = (1 << (width - 1)) - 1  # all bits but the sign: -0.0 is zero
    return not any((np.frombuffer(block, f"<u{width // 8}") & magnitude).any() for block in blocks(ref))


def same_values(stored: TensorRef, other: TensorRef) -> bool:
    """Return True when a tensor has the values of a stored one, after rounding to the stored one's dtype.

    Raises:
        CheckpointError: a file ends too soon.
    """
    if stored.shape != other.shape:
        return False
    # The same dtype rounds nothing: comparing digests compares the bytes.
    if stored.dtype == other.dtype:
        return tensor_digest(stored) == tensor_digest(other)
    if not {stored.dtype, other.dtype} <= TORCH_NAMES.keys():
        return False
    import torch

    n_elements = math.prod(stored.shape)
    with open_source(stored.file) as one, open_source(other.file) as two:
        for start in range(0, n_elements, _COMPARED_ELEMENTS):
            end = min(start + _COMPARED_ELEMENTS, n_elements)
            here, there = _elements(one, stored, start, end), _elements(two, other, start, end)
            if not torch.equal(there.to(here.dtype), here):
                return False
    return True


def differing_rows(stored: TensorRef, other: TensorRef) -> int:
    """Return the number of rows, of those that both tensors have, in which they differ. Rows that are equal after
    rounding to either dtype count as equal.

    Raises:
        CheckpointError: a file ends too soon.
    """
    import torch

    n_rows = min(stored.shape[0], other.shape[0])
    row = math.prod(stored.shape[1:])
    step = max(1, _COMPARED_ELEMENTS // max(row, 1))
    count = 0
    with open_source(stored.file) as one, open_source(other.file) as two:
        for first in range(0, n_rows, step):
            end = min(first + step, n_rows)
            here = _elements(one, stored, first * row, end * row).view(end - first, row)
            there = _elements(two, other, first * row, end * row).view(end - first, row)
            same = torch.eq(there.to(here.dtype), here).all(1) | torch.eq(here.to(there.dtype), there).all(1)
            count += int((~same).sum())
    return count


def _elements(source: Source, ref: TensorRef, start: int, end: int) -> torch.Tensor:
    """Return a range of a tensor's elements, one-dimensional, in the stored dtype."""
    import torch

    size = DTYPE_BITS[ref.dtype] // 8
    raw = torch.empty((end - start) * size, dtype=torch.uint8)
    read_into(source, raw.numpy().data, ref.start + start * size)
    return raw.view(getattr(torch, TORCH_TYPES[ref.dtype]))


_NORM_ELEMENTS = 1 << 16
"""Elements that are squared at once."""

_NORM_BYTES = 1 << 20
"""Bytes that are read at once for that: they are still in the cache when they are squared."""


class Squares:
    """Sums squares in float64.

    In parts, whose float64 stays in the processor's cache: new memory for a whole block takes ten times as long. By a
    dot product, since torch's sum of float32 as float64 takes three times as long. Compiled code needs no space.
    """

    def __init__(self) -> None:
        import torch

        self._space = torch.empty(_NORM_ELEMENTS, dtype=torch.float64)

    def of(self, values: torch.Tensor) -> float:
        """Return the sum of the squares of a one-dimensional floating-point tensor."""
        import torch

        if values.dtype == torch.bfloat16 and values.is_contiguous() and (found := library()) is not None:
            return found.squares(values.data_ptr(), values.numel())
        total = 0.0
        for part in torch.split(values, _NORM_ELEMENTS):
            wide = self._space[: part.numel()].copy_(part)
            total += wide.dot(wide).item()
        return total


def box_norm(ref: TensorRef, box: Box = ()) -> float:
    """Return the Frobenius norm of a part of a floating-point tensor, read block by block and summed in float64.

    Args:
        ref: the tensor.
        box: a range per axis; empty for all of it.

    Raises:
        CheckpointError: the file ends too soon.
    """
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_NAMES[ref.dtype])
    box = box or tuple((0, size) for size in ref.shape)
    # From this axis on the box covers every axis whole, so these axes are adjacent in the file.
    whole_from = next(
        (axis for axis in range(len(box), 0, -1) if box[axis - 1] != (0, ref.shape[axis - 1])), 0
    )
    size = DTYPE_BITS[ref.dtype] // 8
    strides = [math.prod(ref.shape[axis + 1 :]) for axis in range(len(ref.shape))]
    total, squares = 0.0, Squares()
    with open_source(ref.file) as source:
        last = max(whole_from - 1, 0)  # from this axis on a range is one run of bytes
        for outer in product(*(range(*limits) for limits in box[:last])):
            first = sum(index * stride for index, stride in zip(outer, strides, strict=False))
            start, end = box[last] if box else (0, 1)
            step = strides[last] if strides else 1
            at, nbytes = ref.start + (first + start * step) * size, (end - start) * step * size
            for block in read_blocks(source, at, nbytes, _NORM_BYTES):
                total += squares.of(torch.frombuffer(block, dtype=dtype))
    return math.sqrt(total)


def load(ref: TensorRef) -> torch.Tensor:
    """Return a whole tensor in its stored dtype and shape. For small ones, such as an adapter's factors.

    Raises:
        CheckpointError: the file ends too soon.
    """
    import torch

    raw = torch.empty(ref.nbytes, dtype=torch.uint8)
    with open_source(ref.file) as source:
        read_into(source, raw.numpy().data, ref.start)
    return raw.view(getattr(torch, STORED_TYPES[ref.dtype])).view(ref.shape)


def load_numbers(ref: TensorRef) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return a whole tensor as float32 in its shape, without torch. For factors in float32, float16 or bfloat16.

    Raises:
        CheckpointError: the file ends too soon.
    """
    raw = bytearray(ref.nbytes)
    with open_source(ref.file) as source:
        read_into(source, memoryview(raw), ref.start)
    return host_floats(raw, ref.dtype).reshape(ref.shape)
