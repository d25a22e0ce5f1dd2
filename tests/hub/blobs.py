"""What a hub that takes uploads keeps of files: their bytes, on its disk under their SHA-256, however they arrived.

Over LFS a client sends them to the hub itself, whole or in parts. Over xet, hf_xet writes chunks into a directory of this machine
(``local://``): its shards say which file has which SHA-256, and hf_xet puts a file together again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

SECTION = 48
"""Bytes of a header, or of an entry, of a shard of xet."""
WITH_RANGES, WITH_SHA256 = 1 << 31, 1 << 30
"""Flags of a file in a shard: its chunks have hashes of ranges; its SHA-256 is given."""
END = b"\xff" * 32
TRIES = 20


class Blobs:
    """Files under their SHA-256, in a directory; what has arrived and was not verified; and the store that hf_xet writes."""

    def __init__(self, root: Path) -> None:
        self.known, self.arrived, self.cas = root / "blobs", root / "arrived", root / "cas"
        for folder in (self.known, self.arrived, self.cas):
            folder.mkdir(parents=True, exist_ok=True)
        for copy in self.arrived.glob("read-*"):  # of a hub that was killed
            shutil.rmtree(copy)

    def path(self, sha256: str) -> Path:
        """Return where a file is."""
        return self.known / sha256

    def add(self, content: bytes) -> str:
        """Keep a small file; return its SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        self.path(sha256).write_bytes(content)
        return sha256

    def receive(self, name: str, pieces: Iterable[bytes]) -> str:
        """Write what arrives under a name, replacing what came before; return its MD5, as S3's tag."""
        digest = hashlib.md5()
        with tempfile.NamedTemporaryFile(dir=self.arrived, delete=False) as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
        Path(file.name).replace(self.arrived / name)
        return digest.hexdigest()

    def join(self, sha256: str, parts: int) -> None:
        """Put the parts of a file together."""
        names = [self.arrived / f"{sha256}.{number}" for number in range(1, parts + 1)]
        self.receive(sha256, (block for name in names for block in _blocks(name)))
        for name in names:
            name.unlink()

    def verify(self, sha256: str, size: int) -> bool:
        """Keep what arrived for good, where it has this SHA-256 and size."""
        arrived = self.arrived / sha256
        if not arrived.is_file():
            return self.path(sha256).is_file()
        digest = hashlib.sha256()
        for block in _blocks(arrived):
            digest.update(block)
        if digest.hexdigest() != sha256 or arrived.stat().st_size != size:
            arrived.unlink()
            return False
        arrived.replace(self.path(sha256))
        return True

    def from_xet(self, sha256: str) -> str | None:
        """Keep a file that hf_xet has written; return its hash of xet, or None where there is none with its content."""
        for _ in range(TRIES):
            hash_and_size = self._in_shards(sha256)
            if hash_and_size is None:
                return None
            if self.path(sha256).is_file() or self._rebuild(*hash_and_size, sha256):
                return hash_and_size[0]
            time.sleep(0.1)
        return None

    def snapshot(self) -> Path:
        """Return a copy of the store of xet that costs next to nothing.

        hf_xet locks the database of a local store for its process: a second process reads a copy, whose files are links.
        """
        copy = Path(tempfile.mkdtemp(prefix="read-", dir=self.arrived))
        source = self.cas / "xet" / "xorbs"
        if source.is_dir():
            half = shutil.ignore_patterns(".*.tmp")  # hf_xet is writing them, and gives them another name
            shutil.copytree(source, copy / "xet" / "xorbs", copy_function=_link_or_copy, ignore=half)
        return copy

    def _in_shards(self, sha256: str) -> tuple[str, int] | None:
        for shard in (self.cas / "xet" / "xorbs" / "shards").glob("*.mdb"):
            for xet, size, content in _files_of_shard(shard.read_bytes()):
                if content == sha256:
                    return xet, size
        return None

    def _rebuild(self, xet: str, size: int, sha256: str) -> bool:
        """Put a file together from a copy of the store; return whether its bytes are right."""
        import hf_xet

        copy = self.snapshot()
        try:
            group = hf_xet.XetSession().new_download_stream_group(endpoint=f"local://{copy}")
            with group:
                self.receive(sha256, group.download_stream(hf_xet.XetFileInfo(xet, size)))
        except (RuntimeError, OSError):  # the copy was made while the database was written
            return False
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return self.verify(sha256, size)


def git_oid(content: bytes) -> str:
    """Return the name that git has for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    """Return the file that git has in the place of one in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _blocks(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(".redb"):
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


def _files_of_shard(data: bytes) -> Iterable[tuple[str, int, str]]:
    """Yield the hash, the size in bytes and the SHA-256 of each file that a shard describes."""
    at = SECTION
    while data[at : at + 32] != END:
        flags, entries = struct.unpack_from("<II", data, at + 32)
        xet = _text(data[at : at + 32])
        segments = range(at + SECTION, at + SECTION * (1 + entries), SECTION)
        size = sum(struct.unpack_from("<I", data, segment + 36)[0] for segment in segments)
        at += SECTION * (1 + entries * (2 if flags & WITH_RANGES else 1))
        if flags & WITH_SHA256:
            yield xet, size, _text(data[at : at + 32])
            at += SECTION


def _text(raw: bytes) -> str:
    """Return a hash as xet writes it: four numbers, whose bytes are stored from the lowest."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
