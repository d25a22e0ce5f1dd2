"""Rows of stored tensors, read by code that shares nothing with the merge: it parses headers itself, and maps nothing."""

from __future__ import annotations

import bisect
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, NamedTuple, Protocol

from lora_merge.checks.contents import content_at, content_of
from lora_merge.checks.decoding import DECODERS, Raw
from lora_merge.checks.floats import floats_at
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.errors import CheckpointError
from lora_merge.runtime.shortage import raise_if_out_of_memory
from lora_merge.storage.reading import stream_of
from lora_merge.storage.sources import open_source

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Sequence  # noqa: TC004 - a field's type, never evaluated
    from typing import BinaryIO

    import torch

    from lora_merge.checks.decoding import Levels
    from lora_merge.checks.floats import Numbers
    from lora_merge.core.tensor import TensorRef
    from lora_merge.core.weight import Weight  # noqa: TC004 - a field's type, never evaluated
    from lora_merge.storage.sources import Source

_ZIP_MAGIC = b"PK\x03\x04"

_TOGETHER_BYTES = 8192
"""Rows of up to so many bytes are read whole where only a part of each is wanted: one read is faster than a thousand."""

_KEPT_BYTES = 8 << 20
"""Factors that are kept, since they are asked for again; of larger ones the last of each thread."""

Within = tuple[int, int] | None
"""The first byte of each row that is wanted, and the one after the last; None for all of them."""

_CODES = {f"torch.{name}": code for code, name in STORED_TYPES.items()}


class Bytes(NamedTuple):
    """Rows of a stored tensor, one after the other."""

    content: bytearray

    dtype: str
    """What the file says they are, a safetensors code."""


class Tensors(Protocol):
    """How formulas read tensors."""

    def tensor(self, ref: TensorRef, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return a tensor as a matrix, a row for each entry of its first axis; all rows or some."""

    def weight(self, weight: Weight, rows: Sequence[int], n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return some rows of a weight that is divided into ``n_rows``, and how far off float32 may have decoded each
        value.
        """


class _Kept:
    """Factors that were read lately."""

    def __init__(self, n_threads: int) -> None:
        self._lock, self._least = threading.Lock(), n_threads
        self._values: OrderedDict[tuple[TensorRef, range], torch.Tensor] = OrderedDict()
        self._nbytes = 0

    def get(self, ref: TensorRef, rows: range) -> torch.Tensor | None:
        """Return some rows of a tensor, if they are kept."""
        with self._lock:
            values = self._values.get((ref, rows))
            if values is not None:
                self._values.move_to_end((ref, rows))
            return values

    def put(self, ref: TensorRef, rows: range, values: torch.Tensor) -> None:
        """Keep some rows of a tensor, and no longer those that were asked for longest ago."""
        with self._lock:
            # Another thread may have read the same meanwhile.
            before = self._values.pop((ref, rows), None)
            self._nbytes += values.nbytes - (before.nbytes if before is not None else 0)
            self._values[ref, rows] = values
            while len(self._values) > self._least and self._nbytes > _KEPT_BYTES:
                self._nbytes -= self._values.popitem(last=False)[1].nbytes


class Reader:
    """Reads rows of stored tensors as float64. Files stay open until the stack closes.

    Args:
        stack: closes the files.
        n_threads: how many may read at a time.
    """

    def __init__(self, stack: contextlib.ExitStack, n_threads: int = 1) -> None:
        self._stack, self._opening = stack, threading.Lock()
        self._open: dict[str, _Safetensors | _Pickled] = {}
        self._kept = _Kept(n_threads)

    def tensor(self, ref: TensorRef, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return a tensor as a float64 matrix, a row for each entry of its first axis; all rows or some."""
        if rows is not None and not isinstance(rows, range):
            return self.source(ref, rows, ref.shape[0])
        # The last ones are kept: each expert of a stack asks for the same, and so do the rows of a weight, one part after the other.
        rows = range(ref.shape[0]) if rows is None else rows
        values = self._kept.get(ref, rows)
        if values is None:
            values = self.source(ref, rows, ref.shape[0])
            self._kept.put(ref, rows, values)
        return values

    def weight(self, weight: Weight, rows: Sequence[int], n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return some rows of a weight of the base, decoded to float64 ``[len(rows), columns]``, and the largest error
        that float32 may have made in each: zero for a plain tensor.
        """
        stored, decoder = _Stored(self, weight, rows, n_rows), DECODERS[weight.storage.codec]
        values = decoder.levels(stored).values
        off = values.new_zeros(values.shape) if decoder.slack is None else decoder.slack(stored, values)
        return values, off

    def written(self, weight: Weight, rows: Sequence[int], n_rows: int) -> Levels:
        """Return some rows of a weight of the output. Its parts are found by their names, whatever the plan says of their
        places.
        """
        return DECODERS[weight.storage.codec].levels(_Written(self, weight, rows, n_rows))

    def whole(self, ref: TensorRef) -> torch.Tensor:
        """Return a tensor of the output, found by its name: float64, one-dimensional."""
        return self.rows(ref.file, ref.name, [0], 1).flatten()

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        """Return some rows of a tensor of base or adapter. It is found by its place: the file may have it under
        another name.
        """
        return self._file(ref.file).source(ref, rows, n_rows)

    def rows(self, file: str, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        """Return some rows of a tensor of the output, found by its name: ``[len(rows), columns]``."""
        return self._file(file).rows(name, rows, n_rows)

    def raw_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int, within: Within) -> Raw:
        """Return the bytes of some rows of a tensor of base or adapter, found by its place."""
        return self._file(ref.file).raw_source(ref, rows, n_rows, within)

    def raw_rows(self, ref: TensorRef, rows: Sequence[int], n_rows: int, within: Within) -> Raw:
        """Return the bytes of some rows of a tensor of the output, found by its name."""
        return self._file(ref.file).raw_rows(ref.name, rows, n_rows, within)

    def floats_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> Numbers | None:
        """Return some rows of a floating-point tensor of base or adapter, found by its place, without torch: float32
        ``[len(rows), columns]``, which is exact. None where the file is pickled.
        """
        file = self._file(ref.file)
        return file.floats_source(ref, rows, n_rows) if isinstance(file, _Safetensors) else None

    def floats_rows(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> Numbers | None:
        """Return the same of a tensor of the output, found by its name."""
        file = self._file(ref.file)
        return file.floats_rows(ref.name, rows, n_rows) if isinstance(file, _Safetensors) else None

    def bytes_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> Bytes | None:
        """Return the bytes of some rows of a tensor of base or adapter, found by its place, without torch. None where the file is
        pickled.
        """
        file = self._file(ref.file)
        return file.bytes_source(ref, rows, n_rows) if isinstance(file, _Safetensors) else None

    def bytes_rows(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> Bytes | None:
        """Return the same of a tensor of the output, found by its name."""
        file = self._file(ref.file)
        return file.bytes_rows(ref.name, rows, n_rows) if isinstance(file, _Safetensors) else None

    def _file(self, file: str) -> _Safetensors | _Pickled:
        with self._opening:
            if file not in self._open:
                source = self._stack.enter_context(open_source(file))
                stream = stream_of(source)
                # By its first bytes, whatever its name.
                is_pickled = stream.read(4) == _ZIP_MAGIC
                self._open[file] = _Pickled(source, stream) if is_pickled else _Safetensors(source, stream)
            return self._open[file]


@dataclass(frozen=True, slots=True)
class _Stored:
    """Some rows of a weight of the base, whose parts are read at the places that the plan has."""

    reader: Reader
    weight: Weight
    rows: Sequence[int]
    n_rows: int

    def share(self, role: str) -> torch.Tensor:
        return self.reader.source(self.weight.parts[role], self.rows, self.n_rows)

    def whole(self, role: str) -> torch.Tensor:
        return self.reader.source(self.weight.parts[role], [0], 1).flatten()

    def part(self, role: str, rows: Sequence[int], n_rows: int, within: Within = None) -> Raw:
        return self.reader.raw_source(self.weight.parts[role], rows, n_rows, within)


class _Written(_Stored):
    """Some rows of a weight of the output, whose parts are read by their names."""

    __slots__ = ()

    def share(self, role: str) -> torch.Tensor:
        ref = self.weight.parts[role]
        return self.reader.rows(ref.file, ref.name, self.rows, self.n_rows)

    def whole(self, role: str) -> torch.Tensor:
        return self.reader.whole(self.weight.parts[role])

    def part(self, role: str, rows: Sequence[int], n_rows: int, within: Within = None) -> Raw:
        return self.reader.raw_rows(self.weight.parts[role], rows, n_rows, within)


class Factors:
    """Tensors of an adapter as float32, each read once and kept."""

    def __init__(self) -> None:
        self._kept: dict[TensorRef, torch.Tensor] = {}

    def tensor(self, ref: TensorRef, rows: Sequence[int] | None = None) -> torch.Tensor:
        """Return a tensor as a float32 matrix; all rows or some, as `Reader.tensor` does.

        Raises:
            CheckpointError: the file cannot be read.
        """
        if ref not in self._kept:
            with open_source(ref.file) as source:
                self._kept[ref] = _read(source, ref.start, ref.nbytes, range(1), ref.dtype, wide=False).view(
                    ref.shape[0], -1
                )
        whole = self._kept[ref]
        if rows is None:
            return whole
        return whole[rows.start : rows.stop] if isinstance(rows, range) else whole[list(rows)]

    def weight(self, weight: Weight, rows: Sequence[int], n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Never called: a projection gets the weight's rows while they pass."""
        raise NotImplementedError


class _Safetensors:
    """A safetensors file, read by its own header. Nothing is mapped."""

    def __init__(self, source: Source, stream: BinaryIO) -> None:
        stream.seek(0)
        length = int.from_bytes(stream.read(8), "little")
        self._source, self._header, self._data_start = source, json.loads(stream.read(length)), 8 + length
        self._spans = sorted(
            (*row["data_offsets"], row["dtype"])
            for name, row in self._header.items()
            if name != "__metadata__"
        )

    def rows(self, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        start, nbytes, dtype = self._named(name)
        return _read(self._source, start, nbytes // n_rows, rows, dtype)

    def raw_rows(self, name: str, rows: Sequence[int], n_rows: int, within: Within) -> Raw:
        start, nbytes, dtype = self._named(name)
        return _raw(self._source, start, nbytes // n_rows, rows, dtype, within)

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        return _read(self._source, ref.start, ref.nbytes // n_rows, rows, self._dtype_at(ref.start))

    def raw_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int, within: Within) -> Raw:
        return _raw(self._source, ref.start, ref.nbytes // n_rows, rows, self._dtype_at(ref.start), within)

    def floats_rows(self, name: str, rows: Sequence[int], n_rows: int) -> Numbers | None:
        start, nbytes, dtype = self._named(name)
        return floats_at(self._source, start, nbytes // n_rows, rows, dtype)

    def floats_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> Numbers | None:
        return floats_at(self._source, ref.start, ref.nbytes // n_rows, rows, self._dtype_at(ref.start))

    def bytes_rows(self, name: str, rows: Sequence[int], n_rows: int) -> Bytes:
        start, nbytes, dtype = self._named(name)
        return Bytes(content_of(self._source, start, nbytes // n_rows, rows), dtype)

    def bytes_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> Bytes:
        return Bytes(
            content_of(self._source, ref.start, ref.nbytes // n_rows, rows), self._dtype_at(ref.start)
        )

    def _named(self, name: str) -> tuple[int, int, str]:
        """Return the place, the bytes and the dtype of a tensor."""
        row = self._header[name]
        begin, end = row["data_offsets"]
        return self._data_start + begin, end - begin, row["dtype"]

    def _dtype_at(self, start: int) -> str:
        at = start - self._data_start
        # The last row that begins at or before this place. Empty tensors may begin there too, so the next
        # ones are looked at.
        spans = self._spans[bisect.bisect_right(self._spans, (at, inf, "")) - 1 :]
        return next(str(dtype) for begin, end, dtype in spans if begin <= at < end)


class _Pickled:
    """A file of ``torch.save``, loaded by torch itself. Of the mapping only the rows that are taken get into memory."""

    def __init__(self, source: Source, stream: BinaryIO) -> None:
        import pickle

        import torch

        self._source = source
        is_local = source.fd is not None  # torch maps files of this machine only
        file = source.text
        stream.seek(0)
        try:
            self._tensors = torch.load(
                file if is_local else stream, map_location="cpu", weights_only=True, mmap=is_local
            )
        except (pickle.UnpicklingError, RuntimeError) as exc:
            # torch raises the same RuntimeError when memory runs out, which says nothing about the file.
            raise_if_out_of_memory(exc)
            raise CheckpointError(file, "", f"torch cannot load it ({exc})"[:300]) from exc

    def rows(self, name: str, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        values: torch.Tensor = self._tensors[name].detach().reshape(n_rows, -1)[list(rows)].double()
        return values

    def source(self, ref: TensorRef, rows: Sequence[int], n_rows: int) -> torch.Tensor:
        if ref.name in self._tensors:
            return self.rows(ref.name, rows, n_rows)
        return _read(self._source, ref.start, ref.nbytes // n_rows, rows, ref.dtype)

    def raw_rows(self, name: str, rows: Sequence[int], n_rows: int, within: Within) -> Raw:
        import torch

        tensor = self._tensors[name].detach()
        content = tensor.contiguous().flatten().view(torch.uint8).view(n_rows, -1)[list(rows)]
        return Raw(content[:, slice(*within)].contiguous() if within else content, _CODES[str(tensor.dtype)])

    def raw_source(self, ref: TensorRef, rows: Sequence[int], n_rows: int, within: Within) -> Raw:
        if ref.name in self._tensors:
            return self.raw_rows(ref.name, rows, n_rows, within)
        return _raw(self._source, ref.start, ref.nbytes // n_rows, rows, ref.dtype, within)


def _read(
    source: Source, start: int, n_bytes: int, rows: Sequence[int], dtype: str, *, wide: bool = True
) -> torch.Tensor:
    """Return rows of ``n_bytes`` each, read at their places in a file, as numbers."""
    return _values(content_of(source, start, n_bytes, rows), dtype, len(rows), wide=wide)


def _raw(source: Source, start: int, n_bytes: int, rows: Sequence[int], dtype: str, within: Within) -> Raw:
    """Return rows of ``n_bytes`` each, or a part of each, read at their places in a file."""
    import torch

    first, last = within or (0, n_bytes)
    if last - first < n_bytes and n_bytes > _TOGETHER_BYTES:
        content = bytearray().join(
            content_at(source, start + row * n_bytes + first, last - first) for row in rows
        )
        first, last, n_bytes = 0, last - first, last - first
    else:
        content = content_of(source, start, n_bytes, rows)
    whole = torch.frombuffer(content, dtype=torch.uint8).view(len(rows), n_bytes)
    return Raw(whole[:, first:last].contiguous(), dtype)


def _values(content: bytearray, dtype: str, n_rows: int, *, wide: bool) -> torch.Tensor:
    """Return stored values as float64 (wide) or float32, ``[n_rows, columns]``. Both are exact."""
    import torch

    values = torch.frombuffer(content, dtype=getattr(torch, STORED_TYPES[dtype]))
    return (values.double() if wide else values.float()).view(n_rows, -1)
