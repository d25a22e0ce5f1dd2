"""Small files and whole adapters of another storage, in a temporary folder for as long as a run needs them.

What was copied keeps its URL as its name: `WithCopies` opens such a text in the copy, and every other one where it is stored.
So plans, records and messages have URLs, and each process can read what they name, with a copy or without.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from dataclasses import replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import TYPE_CHECKING, Protocol

from lora_merge.core.identity import Inputs
from lora_merge.errors import ResolveError
from lora_merge.runtime.temporary import folder_for
from lora_merge.storage import input_files
from lora_merge.storage.local import LOCAL
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.storage.source import is_hub_text

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from lora_merge.core.identity import FileIdentity
    from lora_merge.storage.local import LocalSource
    from lora_merge.storage.objects.store import Entry
    from lora_merge.storage.sources import Scheme, Source


class Far(Protocol):
    """A folder of another storage, as its local copy asks it."""

    @property
    def text(self) -> str:
        """Its URL, without a slash at the end."""

    def bring(self, names: Sequence[str], root: Path, entries: Mapping[str, Entry]) -> list[FileIdentity]:
        """Put files of the folder below a local one, under their names; return the version of each.

        Raises:
            ResolveError: one cannot be read, or not be put there.
            ChangedError: one has another version than its entry.
        """

    def beside(self, folder: str) -> Mapping[str, Entry]:
        """Return the files of a sibling folder, by their names in it.

        Raises:
            ResolveError: the storage cannot be asked.
        """


class LocalCopy:
    """A folder of another storage, of which some files are on this machine too. What is here is removed with the last
    reference.

    Args:
        far: the folder.
        entries: its listing.
    """

    def __init__(self, far: Far, entries: Mapping[str, Entry]) -> None:
        self.text, self._far = far.text, far
        self.entries = dict(entries)
        self.versions: dict[str, FileIdentity] = {}
        """Of each file that was copied, by its name in the folder."""

        self.home = folder_for(self)
        # A reader may look beside the folder, and must find nothing there that is not the storage's.
        self.root = self.home / self.text.rpartition("/")[2]
        self.root.mkdir()

    @property
    def above(self) -> str:
        """The URL of what `home` stands for: the text of the folder without its last part."""
        return self.text.rpartition("/")[0]

    @property
    def names(self) -> frozenset[str]:
        """Names of all files of the folder, copied or not."""
        return frozenset(self.entries)

    @property
    def absent(self) -> frozenset[str]:
        """No file is missing: the storage is always asked."""
        return frozenset()

    def folders_with(self, name: str) -> frozenset[str]:
        """Return the folders below this one that hold a file of this name, relative to it; it is not one itself."""
        paths = map(PurePosixPath, self.entries)
        return frozenset(str(path.parent) for path in paths if path.name == name and len(path.parts) > 1)

    def beside(self, folder: str) -> frozenset[str]:
        """Return the files of a sibling folder, relative to this one (``../folder/name``).

        Raises:
            ResolveError: the storage cannot be asked.
        """
        found = self._far.beside(folder)
        self.entries.update({f"../{folder}/{name}": entry for name, entry in found.items()})
        return frozenset(f"../{folder}/{name}" for name in found)

    def fetch(self, names: Collection[str]) -> Path:
        """Copy files that are not here yet, and return the local folder.

        Raises:
            ResolveError: one cannot be read, or the disk is full.
            ChangedError: the run has read another version of one.
        """
        wanted = sorted(set(names) - self.versions.keys())
        if wanted:
            brought = self._far.bring(wanted, self.root, self.entries)
            self.versions.update(zip(wanted, brought, strict=True))
        for name in names:
            # The run means these versions, also of what an earlier run has copied.
            with self.open(name) as source:
                input_files.tell_opened(source)
        return self.root

    def text_of(self, name: str) -> str:
        """Return the URL of a file."""
        return text_below(self.text, name)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Source]:
        """Open a file that was copied, under its URL and with its version in its storage."""
        with LOCAL.open(normpath(self.root / name)) as local:
            yield _CopiedSource(self.text_of(name), local, self.versions[name])


class _CopiedSource:
    """A copied file as a source of its storage (a `storage.sources.Source`)."""

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
    """A storage's scheme (a `storage.sources.Scheme`) that opens what was copied in its copy."""

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
        """Return which version has a name there now.

        Raises:
            OSError: it does not exist, or cannot be looked at.
        """
        return self._stored.version_at(text)


def not_copied(text: str, exc: OSError) -> ResolveError:
    """Return the error for a file that this machine does not take."""
    sentence = f"{text}: cannot be copied to this machine ({exc.strerror or exc})"
    return ResolveError(sentence, hint="check the disk of temporary files; TMPDIR names another one")


def text_below(folder: str, name: str) -> str:
    """Return the URL of a file, by its name in a folder.

    Example:
        >>> text_below("s3://models/run/last", "../extra/x"), text_below("s3://models/run", "a/b")
        ('s3://models/run/extra/x', 's3://models/run/a/b')
    """
    above, _, leaf = folder.rpartition("/")
    return f"{above}/{normpath(f'{leaf}/{name}')}"


# Weak: a copy lives as long as what was planned from it. The newest copy of a folder has its name.
_NAMED: weakref.WeakValueDictionary[str, LocalCopy] = weakref.WeakValueDictionary()
_LIVE: weakref.WeakSet[LocalCopy] = weakref.WeakSet()
_LOCK = threading.Lock()


def named(text: str) -> LocalCopy | None:
    """Return the newest copy of a folder that is alive; None where there is none."""
    with _LOCK:
        return _NAMED.get(text)


def enlist(copy: LocalCopy) -> LocalCopy:
    """Let a new copy stand for its folder, and return it."""
    with _LOCK:
        _NAMED[copy.text] = copy
        _LIVE.add(copy)
    return copy


def local_path(text: str) -> Path:
    """Return the path of a text; of a URL, that of its local copy.

    Raises:
        ResolveError: it is a URL, and is not copied to this machine.
    """
    if not is_store_url(text) and not is_hub_text(text):
        return Path(text)
    # A list, since entries of a weak dictionary may vanish meanwhile.
    for url, copy in list(_NAMED.items()):
        if text == url or text.startswith(f"{url}/"):
            return Path(normpath(copy.home / text.removeprefix(f"{copy.above}/")))
    raise ResolveError(f"{text}: is not on this machine", hint="pass a directory")


def in_store(text: str) -> tuple[str, frozenset[str]]:
    """Return where the weight files of a copied folder are, and the names of its files; of a directory, nothing."""
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


def without_copies(inputs: Inputs) -> Inputs:
    """Return inputs whose copied files have their URLs, and the versions that its storage has for them.

    What is read of a copy is noted under a temporary path, with times that say nothing of its storage.
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
