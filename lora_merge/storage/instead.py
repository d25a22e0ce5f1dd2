"""What a file really is when it is not what its name says, told by its first bytes: a Git LFS pointer, a web page, an archive."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_merge.errors import CheckpointError
from lora_merge.storage.sources import open_unwatched

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HEAD_BYTES = 512
"""Bytes that are read of such a file; a tar file has its mark at byte 257."""

_LFS = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download it again; a private or gated repo needs a token"


class Instead(NamedTuple):
    """What a file really is, and what to do about it."""

    sentence: str
    """The rest of a sentence that begins with the file's path."""

    hint: str


_STARTS: tuple[tuple[bytes, Instead], ...] = (
    (
        _LFS,
        Instead(
            "is a Git LFS pointer: the file itself was not downloaded",
            "run git lfs install and git lfs pull in its folder, or download it again",
        ),
    ),
    (
        b"/annex/objects",
        Instead("is a pointer of git-annex: the file itself was not downloaded", "run git annex get on it"),
    ),
    (b"GGUF", Instead("is a GGUF file, for llama.cpp", "pass the checkpoint that it was converted from")),
    (b"PK\x03\x04", Instead("is a zip file", "unpack it, or rename it to .bin if torch.save wrote it")),
    (b"\x1f\x8b", Instead("is a gzip archive", "unpack it: tar xzf, or gunzip")),
    (b"\x28\xb5\x2f\xfd", Instead("is a zstd archive", "unpack it: unzstd")),
    (b"\xfd7zXZ", Instead("is an xz archive", "unpack it: tar xJf, or unxz")),
    (b"7z\xbc\xaf", Instead("is a 7z archive", "unpack it")),
    (b"Rar!", Instead("is a rar archive", "unpack it")),
    (b"\x93NUMPY", Instead("is a NumPy file", "save its tensors as safetensors")),
    (
        b"\x89HDF",
        Instead(
            "is an HDF5 file of TensorFlow or Keras", "load it in transformers and save it as safetensors"
        ),
    ),
    (b"\xef\xbb\xbf", Instead("begins with a byte order mark", "save it as UTF-8 without one")),
    (b"\xff\xfe", Instead("is UTF-16 text", "save it as UTF-8")),
)

_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
_REFUSALS = (
    b"repository not found",
    b"entry not found",
    b"invalid username",
    b"invalid credentials",
    b"access to model",
)
"""How texts begin that the Hub sends instead of a file."""

_TESTS: tuple[tuple[Callable[[bytes], bool], Instead], ...] = (
    (
        lambda text: text.startswith(_PAGES),
        Instead("is a web page: the server sent an error or its login page", _AGAIN),
    ),
    (
        # A JSON file may begin like that too, but an error message is short.
        lambda text: text.startswith(_REFUSALS) or (text.startswith(b'{"error"') and len(text) < HEAD_BYTES),
        Instead("is an error message of a server: the file itself was not downloaded", _AGAIN),
    ),
)


def instead_of(path: str | Path) -> Instead | None:
    """Return what a file really is; None where its first bytes do not tell, or it cannot be read."""
    found_head = _head_of(path)
    if found_head is None:
        return None
    head, size = found_head
    # An interrupted download may leave an empty file.
    if size == 0:
        return Instead("is empty (0 bytes)", "download it again, or save it again")
    if not any(head):
        return Instead(
            "begins with zeros only, after a failure of the download or the disk", "download it again"
        )
    found = next((what for start, what in _STARTS if head.startswith(start)), None)
    if found is None and head[257:262] == b"ustar":
        found = Instead("is a tar archive", "unpack it: tar xf")
    if found is not None:
        return found
    text = head.lstrip(b" \t\r\n").lower()
    return next((what for is_one, what in _TESTS if is_one(text)), None)


def is_page(path: Path) -> bool:
    """Return True when a server sent a web page or an error in the file's place."""
    what = instead_of(path)
    return what is not None and what.hint == _AGAIN


def is_pointer(path: Path) -> bool:
    """Return True for a Git LFS pointer: a short text in the place of the file."""
    found = _head_of(path)
    return found is not None and found[1] < HEAD_BYTES and found[0].startswith(_LFS)


def _head_of(path: str | Path) -> tuple[bytes, int] | None:
    """Return the first `HEAD_BYTES` of a regular file, and its size in bytes; None where it cannot be read.

    Pipes and devices are refused, since reading one might block or never end.
    """
    head = bytearray(HEAD_BYTES)
    try:
        with open_unwatched(path) as source:
            # Unwatched: it is opened only to say what it is.
            return bytes(head[: source.read_into(memoryview(head), 0)]), source.nbytes
    except (CheckpointError, OSError):
        return None
