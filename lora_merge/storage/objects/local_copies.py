"""Small files and whole adapters of an object store, copied to a temporary folder for as long as a run needs them.

What was copied keeps its URL as its name: `WithCopies` opens such a text in the copy, and every other one in the store.
So plans, records and messages have URLs, and each process can read what they name, with a copy or without.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import TYPE_CHECKING

from lora_merge.core.identity import Inputs
from lora_merge.errors import ResolveError
from lora_merge.runtime.temporary import folder_for
from lora_merge.storage import input_files
from lora_merge.storage.local import LOCAL
from lora_merge.storage.objects.urls import StoreUrl, parse_store_url
from lora_merge.storage.paths import weight_hint
from lora_merge.storage.reading import read_blocks

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from lora_merge.core.identity import FileIdentity
    from lora_merge.core.report import Observer
    from lora_merge.storage.local import LocalSource
    from lora_merge.storage.objects.store import Entry, Store
    from lora_merge.storage.sources import Scheme, Source

_AT_ONCE = 8
"""Files that are copied at the same time."""


class LocalCopy:
    """A prefix of a store, of which some files are on this machine too. The folder is removed with the last reference.

    Args:
        url: the prefix.
        entries: its listing.
        watch: hears of what is copied.
    """

    def __init__(self, url: StoreUrl, entries: Mapping[str, Entry], watch: Observer) -> None:
        self.url, self._watch = url, watch
        self.entries = dict(entries)
        self.versions: dict[str, FileIdentity] = {}
        """Of each file that was copied, by its name below the prefix."""

        self.home = folder_for(self)
        # A reader may look beside the folder, and must find nothing there that is not the store's.
        self.root = self.home / (url.prefix.rpartition("/")[2])
        self.root.mkdir()

    @property
    def above(self) -> str:
        """The URL of what `home` stands for: the text of the prefix without its last part."""
        return str(self.url).rpartition("/")[0]

    @property
    def names(self) -> frozenset[str]:
        """Names of all files below the prefix, copied or not."""
        return frozenset(self.entries)

    @property
    def absent(self) -> frozenset[str]:
        """No file is missing: a store is always asked."""
        return frozenset()

    def folders_with(self, name: str) -> frozenset[str]:
        """Return the folders below the prefix that hold a file of this name, relative to it; the prefix is not one."""
        paths = map(PurePosixPath, self.entries)
        return frozenset(str(path.parent) for path in paths if path.name == name and len(path.parts) > 1)

    def beside(self, folder: str) -> frozenset[str]:
        """Return the files of a sibling folder, relative to the prefix (``../folder/name``).

        Raises:
            ResolveError: the store cannot be asked.
        """
        above = self.url.prefix.rpartition("/")[0]
        if not above:
            return frozenset()
        sibling = StoreUrl(self.url.scheme, self.url.bucket, f"{above}/{folder}")
        found = sound(opened(sibling).entries())
        self.entries.update({f"../{folder}/{name}": entry for name, entry in found.items()})
        return frozenset(f"../{folder}/{name}" for name in found)

    def fetch(self, names: Collection[str]) -> Path:
        """Copy files that are not here yet, and return the local folder of the prefix.

        Raises:
            ResolveError: one cannot be read, or the disk is full.
            ChangedError: the run has read another version of one.
        """
        wanted = sorted(set(names) - self.versions.keys())
        if wanted:
            self._watch.phase(f"downloading {self.url}", sum(self.entries[name].nbytes for name in wanted))
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for name, version in zip(wanted, pool.map(self._copied, wanted), strict=True):
                self.versions[name] = version
                self._watch.advance(version.size)
        for name in names:
            # The run means these versions, also of what an earlier run has copied.
            with self.open(name) as source:
                input_files.tell_opened(source)
        return self.root

    def _copied(self, name: str) -> FileIdentity:
        """Copy one file; return its version."""
        path = Path(normpath(self.root / name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._stored(name) as source, path.open("xb") as file:
                for block in read_blocks(source, 0, source.nbytes):
                    file.write(block)
                return source.version
        except OSError as exc:
            sentence = f"{self.text_of(name)}: cannot be copied to this machine ({exc.strerror or exc})"
            raise ResolveError(
                sentence, hint="check the disk of temporary files; TMPDIR names another one"
            ) from exc

    def _stored(self, name: str) -> contextlib.AbstractContextManager[Source]:
        """Open a file in the store, beside the prefix or below it."""
        folder, _, leaf = self.text_of(name).rpartition("/")
        url = parse_store_url(folder)
        assert url is not None
        entry = self.entries[name]
        # Without a version, the store is asked once more.
        return opened(url).source(leaf, entry if entry.version else None)

    def text_of(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.above}/{normpath(f'{self.root.name}/{name}')}"

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Source]:
        """Open a file that was copied, under its URL and with its version in the store."""
        with LOCAL.open(normpath(self.root / name)) as local:
            yield _CopiedSource(self.text_of(name), local, self.versions[name])


class _CopiedSource:
    """A copied file as a source of the store (a `storage.sources.Source`)."""

    fd = None
    """None: whoever asks for a descriptor takes the file for one that may change, and its times for those of the input."""

    def __init__(self, text: str, local: LocalSource, version: FileIdentity) -> None:
        self.text, self.nbytes, self.version = text, local.nbytes, version
        self._local = local

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read into a buffer from an offset; return the number of bytes, 0 at the end.

        Raises:
            OSError: they cannot be read.
        """
        return self._local.read_into(buffer, offset)

    def ahead(self, start: int, nbytes: int) -> None:
        """Ask the kernel to read a range ahead."""
        self._local.ahead(start, nbytes)


class WithCopies:
    """A store's scheme (a `storage.sources.Scheme`) that opens what was copied in its copy."""

    def __init__(self, stored: Scheme) -> None:
        self._stored = stored

    def open(self, text: str) -> contextlib.AbstractContextManager[Source]:
        """Open a file for the length of a block.

        Raises:
            CheckpointError: it is missing, or cannot be opened.
        """
        found = _copied_as(text)
        return self._stored.open(text) if found is None else found[0].open(found[1])

    def version_at(self, text: str) -> FileIdentity:
        """Return which version has a name in the store now.

        Raises:
            OSError: it does not exist, or cannot be looked at.
        """
        return self._stored.version_at(text)


# Weak: a copy lives as long as what was planned from it. The newest copy of a prefix has its name.
_NAMED: weakref.WeakValueDictionary[str, LocalCopy] = weakref.WeakValueDictionary()
_LIVE: weakref.WeakSet[LocalCopy] = weakref.WeakSet()
_LOCK = threading.Lock()


def local_copy(url: StoreUrl, watch: Observer) -> LocalCopy:
    """Return the local copy of a prefix, with its listing. A live one is used again unless a copied file has changed.

    Args:
        url: the prefix.
        watch: hears of what is copied.

    Raises:
        ResolveError: nothing is there, or the store cannot be asked.
    """
    entries = listed(url, opened(url))
    with _LOCK:
        known = _NAMED.get(str(url))
    if known is not None and _is_current(known, entries):
        known.entries |= entries
        return known
    made = LocalCopy(url, entries, watch)
    with _LOCK:
        _NAMED[str(url)] = made
        _LIVE.add(made)
    return made


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


def local_path(text: str) -> Path:
    """Return the path of a text; of a URL, that of its local copy.

    Raises:
        ResolveError: it is a URL, and is not copied to this machine.
    """
    if parse_store_url(text) is None:
        return Path(text)
    # A list, since entries of a weak dictionary may vanish meanwhile.
    for url, copy in list(_NAMED.items()):
        if text == url or text.startswith(f"{url}/"):
            return Path(normpath(copy.home / text.removeprefix(f"{copy.above}/")))
    raise ResolveError(f"{text}: is not on this machine", hint="pass a directory")


def in_store(text: str) -> tuple[str, frozenset[str]]:
    """Return where the weight files of a copied prefix are, and the names of its files; of a directory, nothing."""
    found = next((copy for url, copy in list(_NAMED.items()) if url == text), None)
    return ("", frozenset()) if found is None else (text, found.names)


def homes() -> dict[str, str]:
    """Return temporary folder → the URL that it stands for, of every copy that is alive."""
    return {str(copy.home): copy.above for copy in list(_LIVE)}


def _copied_as(text: str) -> tuple[LocalCopy, str] | None:
    """Return the copy that has a file, and the file's name in it."""
    for copy in list(_NAMED.values()):
        if text.startswith(f"{copy.above}/"):
            name = os.path.relpath(text.removeprefix(f"{copy.above}/"), copy.root.name)
            if name in copy.versions:
                return copy, name
    return None


def _is_current(copy: LocalCopy, entries: Mapping[str, Entry]) -> bool:
    """Return True where a listing has the versions that were copied; False for what is beside the prefix, not in it."""
    return all(
        name in entries and (entries[name].nbytes, entries[name].version) == (version.size, version.tag)
        for name, version in copy.versions.items()
    )


def without_copies(inputs: Inputs) -> Inputs:
    """Return inputs whose copied files have their URLs, and the versions that the store has for them.

    What is read of a copy is noted under a temporary path, with times that say nothing of the store.
    """
    known = homes()
    here = [path for path in inputs.files if any(path.startswith(f"{home}{os.sep}") for home in known)]
    names = {path: _named(path, known) for path in here}
    files = {path: file for path, file in inputs.files.items() if path not in names}
    readings = {
        replace(place, file=names.get(place.file, place.file)): digest
        for place, digest in inputs.readings.items()
    }
    return Inputs(files, {place: digest for place, digest in readings.items() if place.file in files})


def _named(path: str, known: Mapping[str, str]) -> str:
    home = next(home for home in known if path.startswith(f"{home}{os.sep}"))
    return known[home] + path.removeprefix(home)
