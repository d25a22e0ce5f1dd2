"""What outputs have in common whose files are elsewhere: weight files go there whole, and small ones wait in a temporary directory."""

from __future__ import annotations

import contextlib
import os
import zlib
from typing import TYPE_CHECKING, Literal, Never

from lora_merge.errors import CheckpointError, WriteError
from lora_merge.runtime.temporary import temporary_folder
from lora_merge.storage import dirs
from lora_merge.storage.destination import UNKNOWN_BYTES
from lora_merge.storage.folder import Folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from lora_merge.core.shards import OutputFile
    from lora_merge.core.tensor import TensorRecord
    from lora_merge.storage.dirs import Listing
    from lora_merge.storage.evidence import Finished
    from lora_merge.storage.objects.store import Entry

RESUMABLE = (KeyboardInterrupt, WriteError, CheckpointError)
"""Errors that say nothing against what a run has written: whole files stay."""


class ShadowedDestination:
    """The common part of `storage.destination.Destination` for stores and the Hub, and of their `Storage`."""

    takes_files = True

    def __init__(self) -> None:
        self._held = contextlib.ExitStack()
        self._shadow = _shadow(self._held)
        self._finished: Mapping[str, Finished] = {}
        """What an interrupted run has left, by file."""

        self._planned: frozenset[str] = frozenset()
        self._merge = ""
        self._is_published = False

    @staticmethod
    def free_bytes(out: str) -> int:
        """Return `UNKNOWN_BYTES`: neither stores nor the Hub say how much room they have."""
        del out
        return UNKNOWN_BYTES

    @property
    def root(self) -> Path:
        """A temporary directory of this machine that has the small files of the output."""
        return self._shadow.path

    @property
    def sink(self) -> Never:
        """There is none: a file is written from its first byte to its last."""
        raise NotImplementedError

    def keep(self, files: Iterable[OutputFile], names: Collection[str]) -> frozenset[str]:
        """Return the names of the files that are whole. Nothing is removed: what is not whole is written again."""
        sizes = {file.name: file.nbytes for file in files}
        return frozenset(
            name
            for name in names
            if name in self._finished and self._finished[name].receipt.nbytes == sizes.get(name)
        )

    def link(
        self, files: Iterable[OutputFile], sources: Mapping[str, str], how: Literal["reflink", "hard"]
    ) -> dict[str, str]:
        """Do nothing: there are no links."""
        del files, sources, how
        return {}

    def note(self, records: Sequence[TensorRecord]) -> None:
        """Do nothing: the worker that made a file has kept its evidence (`FilePlace.note`)."""

    def rest(self) -> None:
        """Do nothing: what is written is sent at once."""

    def write_text(self, name: str, text: str) -> None:
        """Write a small file into the temporary directory; `commit` sends it.

        Raises:
            WriteError: it cannot be written.
        """
        self._shadow.write_text(name, text)

    def copy_in(self, source: str, name: str) -> str:
        """Copy a file of an input into the temporary directory; return the digest of the bytes that were read.

        Raises:
            CheckpointError: it cannot be read.
            WriteError: it cannot be written.
        """
        return self._shadow.copy_in(source, name)

    def flush(self) -> None:
        """Do nothing: what is there is durable."""


def listing_of(entries: Mapping[str, Entry]) -> Listing:
    """Return files as a directory's listing has them: in the place of an inode, another version has another number."""
    return {name: (zlib.crc32(entry.version.encode()), entry.nbytes, 0, 0) for name, entry in entries.items()}


def _shadow(held: contextlib.ExitStack) -> Folder:
    """Return a new temporary directory; it is removed with the stack."""
    path = held.enter_context(temporary_folder())
    fd = dirs.open_directory(path)
    held.callback(os.close, fd)
    return Folder.of(path, fd)
