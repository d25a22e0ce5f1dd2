"""Find checkpoints and adapters in a directory tree, and digest their files.

Only names and bytes on the disk are looked at. Nothing of lora_merge is imported: the same code looks at the outputs of
any commit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path

MANIFEST = "merge_manifest.json"
STAGING = ".lora-merge-staging"
"""How the name of a directory ends in which a run still builds: it is no output, and how far it got depends on timing."""

_STAMPED = re.compile(rb"-t[0-9a-f]{8}")
_WEIGHTS = (".safetensors", ".gguf")
_ADAPTER = "adapter_config.json"

Parts = dict[str, str]
"""Digests of the parts of a file, and of the whole under ``""``."""

Files = dict[str, tuple[int, Parts]]
"""Path in its directory → bytes, and digests."""


def number_of(*what: object) -> int:
    """Return a number of 32 bits for what is said in texts and numbers, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=4).digest(), "big")


def stamp(*what: object) -> str:
    """Return what a recording puts at the end of a temporary directory's name, in the place of a counter or a random text."""
    return f"-t{number_of(*what):08x}"


def unstamped(text: str) -> str:
    """Return a path or name without suffixes."""
    return _STAMPED.sub(b"", text.encode()).decode()


def digest(data: bytes) -> str:
    """Return 128 bits, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain(data: bytes, places: dict[str, str]) -> bytes:
    """Return the bytes of a file with the paths of this recording replaced: they differ from one recording to the next."""
    for place, token in sorted(places.items(), key=lambda pair: -len(pair[0])):
        data = data.replace(place.encode(), token.encode())
    return _STAMPED.sub(b"", data)


def parts_of(name: str, data: bytes) -> Parts:
    """Return the digests of a file: of the whole, of each key of a JSON object, of a header and of each tensor.

    Raises:
        ValueError: it is not the format that its name says; a test may have broken it.
    """
    parts = {"": digest(data)}
    if name.endswith(".json"):
        found = json.loads(data)
        if isinstance(found, dict):
            parts |= {f"key {key}": digest(json.dumps(value).encode())[:12] for key, value in found.items()}
    elif name.endswith(".safetensors"):
        begin = 8 + int.from_bytes(data[:8], "little")
        parts["header"] = digest(data[:begin])[:12]
        for tensor, row in json.loads(data[8:begin]).items():
            if tensor != "__metadata__":
                first, last = row["data_offsets"]
                parts[f"tensor {tensor}"] = digest(data[begin + first : begin + last])[:12]
    return parts


def is_recorded(names: list[str]) -> bool:
    """Return True for the files of a directory that holds a checkpoint or an adapter."""
    return any(name in {MANIFEST, _ADAPTER} or name.endswith(_WEIGHTS) for name in names)


class Looker:
    """Looks at directories again and again, and reads what has changed since."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places
        self._seen: dict[str, object] = {}

    def look(self, top: str) -> list[tuple[str, Files]]:
        """Return every recorded directory under one that is new, or has changed since the last look."""
        found = []
        for root, folders, names in os.walk(top):
            folders[:] = sorted(name for name in folders if not name.endswith(STAGING))
            if not is_recorded(names):
                continue
            paths = _below(root) if MANIFEST in names else [Path(root, name) for name in sorted(names)]
            if MANIFEST in names:
                folders.clear()
            signature = [_signature(path) for path in paths]
            if self._seen.get(root) != signature:
                self._seen[root] = signature
                found.append((root, self._digested(Path(root), paths)))
        return found

    def _digested(self, root: Path, paths: list[Path]) -> Files:
        files: Files = {}
        for path in paths:
            if not path.is_file():  # a pipe, a device, a link to nothing: a test put it there
                continue
            try:
                data = plain(path.read_bytes(), self._places)
            except PermissionError:
                continue
            name = path.relative_to(root).as_posix()
            try:
                parts = parts_of(name, data)
            except (ValueError, KeyError, TypeError, AttributeError):
                parts = {"": digest(data)}
            files[name] = (len(data), parts)
        return files


def _below(root: str) -> list[Path]:
    return sorted(Path(folder, name) for folder, _, names in os.walk(root) for name in names)


def _signature(path: Path) -> object:
    try:
        status = path.lstat()
    except OSError:
        return None
    return path.name, status.st_ino, status.st_size, status.st_mtime_ns, stat.S_IFMT(status.st_mode)
