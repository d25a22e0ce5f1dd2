"""What a run asks of an object store, whatever its kind and the library that speaks to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from lora_merge.core.identity import FileIdentity
from lora_merge.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from contextlib import AbstractContextManager

    from lora_merge.storage.objects.urls import StoreUrl
    from lora_merge.storage.sources import Source


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as a listing has it."""

    nbytes: int

    version: str
    """Its ETag, without quotes. Other bytes under the same name have another one."""

    modified: float = field(default=0.0, compare=False)
    """When it was written, in seconds since 1970, by the store's clock; 0 where that was not asked for."""

    @property
    def identity(self) -> FileIdentity:
        """Which bytes these are, as sources have it."""
        return FileIdentity(0, 0, self.nbytes, 0, 0, self.version)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a store says of a file that was written."""

    nbytes: int

    version: str
    """Its ETag, as `Entry` has it."""

    checksum: str = ""
    """Of the whole object, on the store's word: ``crc64nvme:`` and 16 hexadecimal digits; empty where it states none."""


class AlreadyThereError(WriteError):
    """An object that was to be created exists."""


def version_of(etag: str | None) -> str:
    """Return a version from an ETag: Azure quotes it in one answer, and not in another.

    Example:
        >>> version_of('"0x8D"'), version_of("0x8D"), version_of(None), match_of("0x8D"), match_of("")
        ('0x8D', '0x8D', '', '"0x8D"', None)
    """
    return (etag or "").strip('"')


def match_of(version: str) -> str | None:
    """Return the condition of a request that demands a version; None where the store has no versions."""
    return f'"{version}"' if version else None


class FileSink(Protocol):
    """One file of an output, written from its first byte to its last. It appears whole when it is closed."""

    @property
    def receipt(self) -> Receipt:
        """What was written; to be asked for after the block of `Store.file` has ended."""

    def write(self, block: memoryview) -> None:
        """Take the next bytes. The block may be reused afterwards.

        Raises:
            WriteError: the store refused something, now or since the last call.
        """

    def copy(self, source: str, start: int, nbytes: int) -> bool:
        """Let the store copy the next bytes from another object by itself.

        Args:
            source: the text of the object, as `StoreUrl.child` makes it.
            start: of the range in it, in bytes.
            nbytes: of the range.

        Returns:
            True where the store will do it; False where the bytes must be read and written.

        Raises:
            WriteError: the store refused something, now or since the last call.
        """


class Store(Protocol):
    """A folder in an object store. It holds secrets: it is made in the process that uses it, and is never pickled.

    Names are relative to `url`, with slashes. Several threads may use a store at once.
    """

    @property
    def url(self) -> StoreUrl:
        """Where it is."""

    @property
    def can_copy(self) -> bool:
        """Whether the store copies ranges by itself (`FileSink.copy`) and states checksums of what it has. May ask it.

        Raises:
            ResolveError: the store cannot be reached.
        """

    def entries(self) -> Mapping[str, Entry]:
        """Return all objects below the folder, by name; empty where there is none.

        Raises:
            ResolveError: the store cannot be asked.
        """

    def entry(self, name: str) -> Entry | None:
        """Return one object; None where there is none.

        Raises:
            ResolveError: the store cannot be asked.
        """

    def get(self, name: str) -> bytes:
        """Return the bytes of a small file.

        Raises:
            ResolveError: it does not exist, or cannot be read.
        """

    def put(self, name: str, data: bytes, *, create: bool = False) -> Entry:
        """Write a small file.

        Args:
            name: of the file.
            data: its bytes.
            create: only where no file has that name; two that try at once cannot both succeed.

        Raises:
            AlreadyThereError: there is one.
            WriteError: it cannot be written.
        """

    def source(self, name: str, entry: Entry | None = None) -> AbstractContextManager[Source]:
        """Open a file for positioned reads.

        Args:
            name: of the file.
            entry: its size and version, where they are known: then reads fail if it has another version. None: asked for.

        Raises:
            CheckpointError: it does not exist, or cannot be read.
        """

    def file(self, name: str, nbytes: int) -> AbstractContextManager[FileSink]:
        """Write a large file in the block. An exception in the block aborts it, and no object appears.

        Args:
            name: of the file.
            nbytes: its size, which must be the number of bytes that the block writes.

        Raises:
            WriteError: it cannot be written.
        """

    def check_writable(self) -> None:
        """Check that files can be made and deleted here, by doing it.

        Raises:
            WriteError: they cannot.
        """

    def delete(self, names: Collection[str]) -> None:
        """Delete files; those that do not exist are ignored.

        Raises:
            WriteError: one cannot be deleted.
        """

    def remove_folder(self) -> None:
        """Remove the folder itself, where the storage has folders, with all that is left in it. It never fails."""

    def abort_uploads(self, names: Collection[str]) -> int:
        """Abort unfinished uploads of files that killed processes left: their parts are in no listing, and are billed.

        Args:
            names: of the files. No other process may be writing them.

        Returns:
            The number of uploads that were aborted; 0 where the storage cannot list them.

        Raises:
            WriteError: the store refuses it.
        """
