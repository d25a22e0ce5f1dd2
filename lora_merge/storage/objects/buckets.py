"""A folder in a store through the package obstore: S3, Google Cloud Storage, Azure, and files of this machine."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError, WriteError
from lora_merge.runtime import packages
from lora_merge.storage.objects.connecting import bucket_of
from lora_merge.storage.objects.failures import reading, writing
from lora_merge.storage.objects.parts import PARTS_UNDER_WAY, PartWriter, part_bytes
from lora_merge.storage.objects.settings import PROBE
from lora_merge.storage.objects.store import Entry, FileSink, Receipt, match_of, version_of
from lora_merge.storage.objects.urls import path_here
from lora_merge.storage.ranged import RangedSource

if TYPE_CHECKING:
    from obstore import ObjectMeta, WritableFile
    from obstore.store import ObjectStore

    from lora_merge.storage.objects.urls import StoreUrl


class BucketStore:
    """A folder in a store (a `Store`).

    Args:
        url: where it is.

    Raises:
        PackageError: obstore is not installed, or cannot be used.
    """

    def __init__(self, url: StoreUrl) -> None:
        self.url = url
        packages.require("obstore", f"{url.scheme}://")
        with reading(str(url)):
            self._bucket: ObjectStore = bucket_of(url)

    def __reduce__(self) -> Any:
        """Refuse to be pickled: the connection holds secrets.

        Raises:
            TypeError: always.
        """
        raise TypeError("a store holds credentials and is not pickled; send its URL")

    @property
    def can_copy(self) -> bool:
        """False: obstore has no copies of ranges, and shows no checksums."""
        return False

    def entries(self) -> Mapping[str, Entry]:
        """Return all objects below the folder, by name.

        Raises:
            CheckpointError: the store cannot be asked.
        """
        import obstore

        start = len(self.url.prefix) + 1
        with reading(str(self.url)):
            found = [meta for batch in obstore.list(self._bucket, prefix=self.url.prefix) for meta in batch]
        # Some tools make an empty object for the folder itself.
        return {meta["path"][start:]: _entry(meta) for meta in found if len(meta["path"]) > start}

    def entry(self, name: str) -> Entry | None:
        """Return one object; None where there is none.

        Raises:
            CheckpointError: the store cannot be asked.
        """
        import obstore

        with reading(self.url.child(name)):
            try:
                return _entry(obstore.head(self._bucket, self._key(name)))
            except FileNotFoundError:
                return None

    def get(self, name: str) -> bytes:
        """Return the bytes of a small file.

        Raises:
            CheckpointError: it does not exist, or cannot be read.
        """
        import obstore

        with reading(self.url.child(name)):
            return bytes(obstore.get(self._bucket, self._key(name)).bytes())

    def put(self, name: str, data: bytes, *, create: bool = False) -> Entry:
        """Write a small file.

        Raises:
            AlreadyThereError: it was to be created, and is there.
            WriteError: it cannot be written.
        """
        import obstore

        with writing(self.url.child(name)):
            result = obstore.put(
                self._bucket,
                self._key(name),
                data,
                mode="create" if create else "overwrite",
                # One request: a small file is there whole, or not at all.
                use_multipart=False,
            )
        return Entry(len(data), version_of(result["e_tag"]))

    @contextlib.contextmanager
    def source(self, name: str, entry: Entry | None = None) -> Iterator[RangedSource]:
        """Open a file for positioned reads.

        Args:
            name: of the file.
            entry: its size and version, where they are known.

        Raises:
            CheckpointError: it does not exist, or cannot be read.
        """
        text = self.url.child(name)
        entry = entry or self.entry(name)
        if entry is None:
            raise CheckpointError(text, "", "does not exist")
        source = RangedSource(text, entry.identity, partial(self._range, name, entry.version))
        try:
            yield source
        finally:
            source.close()

    def _range(self, name: str, tag: str, start: int, end: int) -> memoryview:
        """Return a range of one version of an object, in one request.

        Raises:
            ChangedError: the object has another version now.
            CheckpointError: it cannot be read.
        """
        import obstore

        with reading(self.url.child(name)):
            got = obstore.get(
                self._bucket, self._key(name), options={"range": (start, end), "if_match": match_of(tag)}
            )
            return memoryview(got.bytes())

    @contextlib.contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[FileSink]:
        """Write a large file in the block; an exception in it aborts the upload.

        Raises:
            WriteError: it cannot be written, or has another size in the end.
        """
        import obstore

        text = self.url.child(name)
        with writing(text):
            upload = obstore.open_writer(
                self._bucket, self._key(name), buffer_size=part_bytes(nbytes), max_concurrency=PARTS_UNDER_WAY
            )
        sink = PartWriter(upload, text, nbytes)
        with _aborting(upload):
            yield sink
            sink.finish()
        with writing(text):
            upload.close()
        # The writer tells no version, so the store is asked for it.
        entry = self.entry(name)
        if entry is None or entry.nbytes != nbytes:
            found = "nothing" if entry is None else f"{entry.nbytes} bytes"
            raise WriteError(f"{text}: the store has {found} after {nbytes} were written")
        sink.closed_as(Receipt(nbytes, entry.version))

    def check_writable(self) -> None:
        """Write an empty object, and delete it.

        Raises:
            WriteError: the store refuses one of the two.
        """
        import obstore

        key = self._key(PROBE)
        with writing(str(self.url)):
            # As the lock is made. A probe of another process, or of one that was killed, says the same.
            with contextlib.suppress(obstore.exceptions.AlreadyExistsError):
                obstore.put(self._bucket, key, b"", mode="create", use_multipart=False)
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._bucket, key)

    def delete(self, names: Collection[str]) -> None:
        """Delete files; those that do not exist are ignored.

        Raises:
            WriteError: one cannot be deleted.
        """
        import obstore

        for name in names:
            # Only some stores say that an object was not there.
            with writing(self.url.child(name)), contextlib.suppress(FileNotFoundError):
                obstore.delete(self._bucket, self._key(name))

    def remove_folder(self) -> None:
        """Remove the directory of ``file://``. What a killed write left there is in no listing of obstore."""
        here = path_here(str(self.url))
        if here is not None:
            shutil.rmtree(here, ignore_errors=True)

    def abort_uploads(self, names: Collection[str]) -> int:  # noqa: ARG002 - obstore cannot list them
        """Return 0: what killed processes left of uploads stays, until a lifecycle rule removes it."""
        return 0

    @cached_property
    def _prefix(self) -> str:
        return f"{self.url.prefix}/"

    def _key(self, name: str) -> str:
        return self._prefix + name


@contextlib.contextmanager
def _aborting(upload: WritableFile) -> Iterator[None]:
    """Abort an upload where the block raises."""
    try:
        yield
    except BaseException:
        # An abort that fails leaves parts behind, which the store's lifecycle rule removes; the cause is told.
        with contextlib.suppress(Exception):
            upload.__exit__(*sys.exc_info())
        raise


def _entry(meta: ObjectMeta) -> Entry:
    return Entry(meta["size"], version_of(meta["e_tag"]), meta["last_modified"].timestamp())
