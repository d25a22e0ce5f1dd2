"""Folders of object stores whose small files and adapters are copied to this machine."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from posixpath import normpath
from typing import TYPE_CHECKING

from lora_merge.errors import ResolveError
from lora_merge.storage.local_copies import LocalCopy, enlist, named, not_copied, text_below
from lora_merge.storage.objects.urls import StoreUrl, parse_store_url
from lora_merge.storage.paths import weight_hint
from lora_merge.storage.reading import read_blocks

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping, Sequence

    from lora_merge.core.identity import FileIdentity
    from lora_merge.core.report import Observer
    from lora_merge.storage.objects.store import Entry, Store
    from lora_merge.storage.sources import Source

_AT_ONCE = 8
"""Files that are copied at the same time."""


class _StoreFolder:
    """A prefix of a store (a `local_copies.Far`).

    Args:
        url: the prefix.
        watch: hears of what is copied.
    """

    def __init__(self, url: StoreUrl, watch: Observer) -> None:
        self._url, self._watch = url, watch

    @property
    def text(self) -> str:
        """Its URL."""
        return str(self._url)

    def beside(self, folder: str) -> Mapping[str, Entry]:
        """Return the files of a sibling folder, by their names in it.

        Raises:
            ResolveError: the store cannot be asked.
        """
        above = self._url.prefix.rpartition("/")[0]
        if not above:
            return {}
        return sound(opened(StoreUrl(self._url.scheme, self._url.bucket, f"{above}/{folder}")).entries())

    def bring(self, names: Sequence[str], root: Path, entries: Mapping[str, Entry]) -> list[FileIdentity]:
        """Copy files to a local folder; return the version of each.

        Raises:
            ResolveError: one cannot be read, or the disk is full.
            ChangedError: one has another version than its entry.
        """
        self._watch.phase(f"downloading {self._url}", sum(entries[name].nbytes for name in names))
        found = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for version in pool.map(lambda name: self._copied(name, root, entries[name]), names):
                found.append(version)
                self._watch.advance(version.size)
        return found

    def _copied(self, name: str, root: Path, entry: Entry) -> FileIdentity:
        """Copy one file; return its version."""
        path = Path(normpath(root / name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._stored(name, entry) as source, path.open("wb") as file:
                for block in read_blocks(source, 0, source.nbytes):
                    file.write(block)
                return source.version
        except OSError as exc:
            raise not_copied(text_below(self.text, name), exc) from exc

    def _stored(self, name: str, entry: Entry) -> contextlib.AbstractContextManager[Source]:
        """Open a file in the store, beside the prefix or below it."""
        folder, _, leaf = text_below(self.text, name).rpartition("/")
        url = parse_store_url(folder)
        assert url is not None
        # Without a version, the store is asked once more.
        return opened(url).source(leaf, entry if entry.version else None)


def local_copy(url: StoreUrl, watch: Observer) -> LocalCopy:
    """Return the local copy of a prefix, with its listing. A live one is used again unless a copied file has changed.

    Args:
        url: the prefix.
        watch: hears of what is copied.

    Raises:
        ResolveError: nothing is there, or the store cannot be asked.
    """
    entries = listed(url, opened(url))
    known = named(str(url))
    if known is not None and _is_current(known, entries):
        known.entries |= entries
        return known
    return enlist(LocalCopy(_StoreFolder(url, watch), entries))


def opened(url: StoreUrl) -> Store:
    """Return the store of a URL.

    Raises:
        PackageError: the package that speaks to it is not installed.
    """
    from lora_merge.storage.objects import store_at

    return store_at(url)


def listed(url: StoreUrl, store: Store) -> dict[str, Entry]:
    """Return the files below a prefix.

    Raises:
        ResolveError: there are none, or the store cannot be asked.
    """
    found = sound(store.entries())
    if not found:
        place, colon, weight = str(url).rpartition(":")
        hint = "check the bucket and the prefix: a prefix is the folder that holds the files"
        if colon and "/" not in weight:
            hint = f"{weight_hint(place, weight)}; or {hint}"
        raise ResolveError(f"{url}: nothing is stored there", hint=hint)
    return found


def sound(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the entries whose names can be those of files: a key of a store may be anything, ``../x`` too.

    Example:
        >>> sorted(sound(dict.fromkeys(["a/b", "a//b", "../x", "/x", "a/", "."])))
        ['a/b']
    """
    return {name: entry for name, entry in entries.items() if _is_sound(name)}


def _is_sound(name: str) -> bool:
    return "\0" not in name and not {"", ".", ".."}.intersection(name.split("/"))


def _is_current(copy: LocalCopy, entries: Mapping[str, Entry]) -> bool:
    """Return True where a listing has the versions that were copied; False for what is beside the prefix, not in it."""
    return all(
        name in entries and (entries[name].nbytes, entries[name].version) == (version.size, version.tag)
        for name, version in copy.versions.items()
    )
