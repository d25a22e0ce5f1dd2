"""Object stores as a row of `storage.sources.SCHEMES`: texts are URLs of objects."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError, ResolveError
from lora_merge.storage import input_files
from lora_merge.storage.objects.store import Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.identity import FileIdentity
    from lora_merge.storage.objects.store import Store
    from lora_merge.storage.sources import Source


class Objects:
    """Object stores (a `storage.sources.Scheme`)."""

    @contextlib.contextmanager
    def open(self, text: str) -> Iterator[Source]:
        """Open an object for the length of a block.

        Raises:
            CheckpointError: it does not exist, or cannot be read.
            RequestError: the text is not a URL of an object, or the package for stores is not installed.
        """
        store, name = _found(text)
        known = input_files.known_version(text)
        # Each read demands the version, so another one is noticed without asking first.
        entry = Entry(known.size, known.tag) if known is not None and known.tag else None
        with store.source(name, entry) as source:
            yield source

    def version_at(self, text: str) -> FileIdentity:
        """Return which version of an object has a name now.

        Raises:
            OSError: it does not exist, or the store cannot be asked.
        """
        store, name = _found(text)
        try:
            entry = store.entry(name)
        except ResolveError as exc:
            raise OSError(errno.EIO, str(exc), text) from None
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, "No such object", text)
        return entry.identity


def _found(text: str) -> tuple[Store, str]:
    """Return the store of an object's folder, and the object's name there."""
    from lora_merge.storage.objects import store_at
    from lora_merge.storage.objects.urls import parse_store_url

    folder, _, name = text.rpartition("/")
    url = parse_store_url(folder)
    if url is None or not name:
        raise CheckpointError(text, "", "is not the URL of an object")
    return store_at(url), name


OBJECTS = Objects()
