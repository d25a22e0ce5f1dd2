"""A storage of another kind, as small as one can be: ``mem://name`` is a key of a dict."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator

from lora_merge.core.identity import FileIdentity
from lora_merge.errors import CheckpointError

SHORT = 1000
"""Bytes that one read has at most: storages give fewer than they are asked for."""


class Held:
    """One of its files, open."""

    fd = None

    def __init__(self, text: str, content: bytes, memory: Memory) -> None:
        self.text, self._content, self._memory = text, content, memory
        self.nbytes, self.version = len(content), _version(content)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        part = self._content[offset : offset + min(len(buffer), SHORT)]
        buffer[: len(part)] = part
        self._memory.n_read += len(part)
        return len(part)

    def ahead(self, start: int, nbytes: int) -> None:
        pass


class Memory:
    """Files in memory, by the whole text that names them."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.n_opened = self.n_read = 0

    @contextlib.contextmanager
    def open(self, text: str) -> Iterator[Held]:
        if text not in self.files:
            raise CheckpointError(text, "", "cannot be opened (nothing has this name)")
        self.n_opened += 1
        yield Held(text, self.files[text], self)

    def version_at(self, text: str) -> FileIdentity:
        if text not in self.files:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return _version(self.files[text])


def _version(content: bytes) -> FileIdentity:
    return FileIdentity(0, 0, len(content), 0, 0, hashlib.sha256(content).hexdigest())
