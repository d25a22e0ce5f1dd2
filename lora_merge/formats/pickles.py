"""Torch's zip files (``pytorch_model.bin`` and the like): where their tensors are stored, found without torch.

``torch.save`` writes a zip without compression: ``NAME/data.pkl`` is a pickle that says how tensors are made from
storages, ``NAME/data/KEY`` are the bytes of a storage. `lora_merge.formats.unpickling` follows the pickle: nothing that it names
is imported or called.

Reference:
    ``torch.serialization._save``, ``_load`` and ``torch._utils._rebuild_tensor_v2`` (torch 2.4 to 2.13).
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from typing import IO, TYPE_CHECKING, cast

from lora_merge.core.checkpoint import WeightFile
from lora_merge.core.tensor import MAX_NAME_CHARACTERS, TensorRef, nbytes_of
from lora_merge.errors import CheckpointError
from lora_merge.formats.unpickling import Machine, OddKeyError, Table, Tensor, UntrustedError, kind_of
from lora_merge.storage.instead import instead_of
from lora_merge.storage.json_values import is_text
from lora_merge.storage.reading import read_into, stream_of
from lora_merge.storage.sources import open_source
from lora_merge.words import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lora_merge.storage.sources import Source

MAX_PICKLE_BYTES = 100_000_000
"""As long as a safetensors header may be. A longer pickle holds values, not places."""

MAX_DIRECTORY_BYTES = 32 << 20
"""The most bytes of a zip file's directory, by its own claim: some 300 000 storages. Python takes 600 bytes for each."""

SAFETENSORS_SUFFIX = ".safetensors"

_PROTOCOLS = frozenset({2, 3})
"""Pickle protocols; with any other, ``torch.load(weights_only=True)`` fails (torch 2.13)."""

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""``torch.serialization.MAGIC_NUMBER``, with which files of torch before 1.6 begin."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
"""A zip entry's local header: magic, then the lengths of the name and of the extra field that follow."""

_STORAGES: Mapping[str, str] = {
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
    "torch.uint16": "U16",
    "torch.uint32": "U32",
    "torch.uint64": "U64",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
}
"""Storage class → safetensors dtype; newer dtypes without a class are named themselves."""

_UNTYPED = frozenset({"torch.storage.UntypedStorage", "torch.UntypedStorage"})

_REFETCH = "download the file again: it is truncated, or was not written by torch.save"
_RESAVE = "load it in transformers or PEFT and save_pretrained() it once, which writes safetensors"
_UNTRUSTED = (
    "save the tensors as safetensors: weights need no code; load such a file only if you trust its author"
)


def read_pickle(path: str | Path, name: str | None = None) -> WeightFile:
    """Return the index of a file that ``torch.save`` wrote. No value is read, and nothing in it is run.

    Tensors that share a storage share their bytes.

    Args:
        path: the file.
        name: what to call it in the result; default: its path.

    Raises:
        CheckpointError: it is not such a file, holds anything but a table of plain tensors, or a tensor is outside
            the file or not contiguous.
    """
    label = str(path)
    with open_source(path) as source:
        archive = _Archive(source)
        order = archive.read("byteorder") if "byteorder" in archive else b"little"
        # Bytes are copied as they are, and safetensors is little-endian.
        if order != b"little":
            got = f"is {order[:20].decode(errors='replace')}-endian"
            raise CheckpointError(label, "byteorder", got, "little-endian", hint=_RESAVE)
        table, others = _load(archive.read("data.pkl"), label)
        refs = [_ref(key, value, archive) for key, value in table.items()]
    if others:  # beside the tensors, in what is forgotten here; torch would make it
        got = f"would call {others[0]}"
        raise CheckpointError(label, "", got, "only plain tensors", hint=_RESAVE)
    refs.sort(key=lambda ref: (ref.start, ref.end))
    return WeightFile(name=name or label, metadata={}, tensors=tuple(refs))


class _Bounded:
    """A stream with a limit on one read: `zipfile` reads a whole directory, of any length that the file claims."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes.

        Raises:
            zipfile.BadZipFile: more are asked for than the directory of any weight file has.
        """
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"a directory of {size} bytes")
        return self._stream.read(size)


class _Archive:
    """The records of a torch zip file, by their names inside its one folder.

    Raises:
        CheckpointError: it is not a zip file, or not from ``torch.save``.
    """

    def __init__(self, source: Source) -> None:
        self._source, self.label = source, source.text
        self._size = source.nbytes
        label = self.label
        entries = self._entries()
        folders = [entry.filename[: -len("data.pkl")] for entry in entries if _is_pickle(entry.filename)]
        if len(folders) != 1:
            got = f"has {len(folders)} records named data.pkl"
            raise CheckpointError(label, "", got, "one, as torch.save writes it", hint=_REFETCH)
        folder = folders[0]
        self._records = {
            entry.filename.removeprefix(folder): entry
            for entry in entries
            if entry.filename.startswith(folder)
        }
        # With two records of one name, torch and this reader could each take another one.
        if len({entry.filename for entry in entries}) != len(entries):
            raise CheckpointError(
                label, "", "has two records with the same name", "one of each", hint=_REFETCH
            )
        # TorchScript stores its constants there; torch.save never does.
        if "constants.pkl" in self._records:
            hint = "export the model's state_dict() instead: this file is a program, not weights"
            raise CheckpointError(label, "", "is a TorchScript archive", "a file of torch.save", hint=hint)

    def _entries(self) -> list[zipfile.ZipInfo]:
        head = bytearray(min(32, self._size))
        read_into(self._source, memoryview(head), 0)
        if _LEGACY_MAGIC in head:
            got = "is in the format of torch before 1.6"
            raise CheckpointError(self.label, "", got, "the zip format", hint=_RESAVE)
        if not head.startswith(_ZIP_MAGIC):
            what = instead_of(self.label)
            if what is not None:
                raise CheckpointError(self.label, "", what.sentence, hint=what.hint)
            # A safetensors header: 8 bytes of length, of which the high ones are zero, then JSON.
            if head[7:10] == b'\0{"':
                hint = f"rename it to end in {SAFETENSORS_SUFFIX}"
                raise CheckpointError(
                    self.label, "", "is a safetensors file, according to its first bytes", hint=hint
                )
            got = f"has {self._size} bytes, and they are not a zip file"
            raise CheckpointError(self.label, "", got, "one of torch.save", hint=_REFETCH)
        try:
            with zipfile.ZipFile(cast("IO[bytes]", _Bounded(stream_of(self._source)))) as archive:
                return archive.infolist()
        # zipfile raises any of these for damaged directories.
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, EOFError, struct.error) as exc:
            got = "has no complete zip directory at its end"
            raise CheckpointError(self.label, "", got, hint=_REFETCH) from exc

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def place(self, name: str, subject: str = "") -> tuple[int, int]:
        """Return where a record's bytes begin in the file, and how many they are.

        Raises:
            CheckpointError: there is no such record, it is compressed, or is outside the file.
        """
        subject = subject or name
        entry = self._records.get(name)
        if entry is None:
            raise CheckpointError(self.label, subject, f"its record {name} is not in the file", hint=_REFETCH)
        # Tensors are read by their place in the file, which only plain bytes have.
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            got = f"its record {name} is compressed or encrypted"
            raise CheckpointError(self.label, subject, got, "plain bytes", hint=_RESAVE)
        header = bytearray(_LOCAL_HEADER.size)
        if entry.header_offset + len(header) <= self._size:
            read_into(self._source, memoryview(header), entry.header_offset)
        # The local header may have another extra field than the directory, since torch pads records to align
        # their data.
        magic, n_name, n_extra = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + len(header) + n_name + n_extra
        if magic != _ZIP_MAGIC or start + entry.file_size > self._size:
            got = f"its record {name} is outside the file"
            raise CheckpointError(self.label, subject, got, hint=_REFETCH)
        return start, entry.file_size

    def read(self, name: str) -> bytes:
        """Return the bytes of a small record.

        Raises:
            CheckpointError: as for `place`; or it has more than `MAX_PICKLE_BYTES`.
        """
        start, nbytes = self.place(name)
        # Before a buffer of that size is made.
        if nbytes > MAX_PICKLE_BYTES:
            got = f"has {nbytes} bytes"
            raise CheckpointError(self.label, name, got, f"at most {MAX_PICKLE_BYTES}", hint=_RESAVE)
        content = bytearray(nbytes)
        read_into(self._source, memoryview(content), start)
        return bytes(content)


def _is_pickle(name: str) -> bool:
    return name.endswith("/data.pkl") and name.count("/") == 1


def _load(content: bytes, label: str) -> tuple[dict[str, object], list[str]]:
    """Return the table of a pickle, made of stand-ins, and the dotted paths of calls in it that do not make plain
    tensors.

    Raises:
        CheckpointError: it names something without a stand-in, is malformed, or does not hold a table.
    """
    # Every pickle from protocol 2 on begins with the opcode PROTO and the number.
    protocol = content[1] if content[:1] == pickle.PROTO and len(content) > 1 else 0
    if protocol not in _PROTOCOLS:
        wanted = "2 or 3, which torch.load reads without trusting the file"
        raise CheckpointError(label, "data.pkl", f"has pickle protocol {protocol}", wanted, hint=_RESAVE)
    machine = Machine(content)
    try:
        value = machine.run()
    except UntrustedError as exc:
        got = f"would import {str(exc)[:80]}"
        raise CheckpointError(label, "", got, "only plain tensors", hint=_UNTRUSTED) from exc
    except OddKeyError as exc:
        got = f"has {exc} as a name"
        raise CheckpointError(label, "", got, "names of tensors", hint=_RESAVE) from exc
    except (ValueError, IndexError) as exc:
        got = f"is a malformed pickle ({exc})"[:200]
        raise CheckpointError(label, "data.pkl", got, hint=_REFETCH) from exc
    if not isinstance(value, Table):
        got = f"contains {kind_of(value)}"
        raise CheckpointError(label, "", got, "a table of tensors by their names", hint=_RESAVE)
    return value.rows, machine.others


def _ref(name: str, value: object, archive: _Archive) -> TensorRef:
    """Return where a tensor is stored.

    Raises:
        CheckpointError: it is not a plain dense tensor, or not all of it is in the file.
    """
    label = archive.label
    if len(name) > MAX_NAME_CHARACTERS:
        got, wanted = f"has a name of {len(name)} characters", f"at most {MAX_NAME_CHARACTERS}"
        raise CheckpointError(label, f"{name[:100]}…", got, wanted, hint=_RESAVE)
    if not is_text(name):
        got = f"has the name {quoted(name)}, which contains half of a UTF-16 pair"
        raise CheckpointError(label, "", got, "text that UTF-8 can encode", hint=_RESAVE)
    # ``{"model": {…}}`` and the like: engines look for tensors at the top only.
    if isinstance(value, Table):
        hint = f"save only the content of {name!r} as the file: engines look for tensors at the top level"
        raise CheckpointError(label, name, "is a table", "a tensor", hint=hint)
    if not isinstance(value, Tensor):
        raise CheckpointError(label, name, f"is {kind_of(value)}", "a plain tensor", hint=_RESAVE)
    dtype = _STORAGES.get(value.kind)
    if dtype is None:
        hint = "convert the tensor, and save it as safetensors"
        raise CheckpointError(label, name, f"is stored as {value.kind}", "a real, plain dtype", hint=hint)
    # A transposed or sliced tensor has its values in another order than its bytes.
    if not value.is_plain or not _is_contiguous(value.shape, value.stride):
        got = f"has the strides {list(value.stride)} for the shape {list(value.shape)}"
        got = got if value.is_plain else "is marked as negated or conjugated"
        hint = "load it, make it contiguous and save it again as safetensors"
        raise CheckpointError(label, name, got, "contiguous values in row-major order", hint=hint)
    width = nbytes_of(dtype, (1,))
    begin, nbytes = value.offset * width, nbytes_of(dtype, value.shape)
    start, held = archive.place(f"data/{value.storage.key}", name)
    # Both the pickle's claim and the size of the record must hold the tensor.
    claimed = value.storage.size * (1 if value.storage.kind in _UNTYPED else width)
    if begin + nbytes > min(held, claimed) or claimed > held:
        got = f"needs bytes {begin} to {begin + nbytes} of a storage of {min(held, claimed)} bytes"
        raise CheckpointError(label, name, got, "a range inside the storage", hint=_REFETCH)
    return TensorRef(name, dtype, value.shape, label, start + begin, nbytes)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Return True when the values are adjacent in row-major order. Strides of axes of size 1 do not matter."""
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    rows = zip(shape, stride, steps, strict=True)
    # A tensor without values is always contiguous.
    return 0 in shape or all(size == 1 or step == wanted for size, step, wanted in rows)
