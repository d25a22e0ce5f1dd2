"""A repo on a hub: its listing, and its files once they are fetched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath

from lora_merge.errors import ResolveError
from lora_merge.storage.source import Origin
from lora_merge.words import listing

Fetch = Callable[[Collection[str]], Path]
"""Names in a repo → the local directory that has those files afterwards, under the same names."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a hub may be asked: with which token, and whether at all."""

    token: str | None = field(default=None, repr=False)
    """For the Hugging Face Hub; None leaves it to ``HF_TOKEN`` and the login."""

    offline: bool = False

    stream_base: bool = False
    """Whether weights of a base on the Hugging Face Hub are read where they are, and not downloaded."""


@dataclass(frozen=True, slots=True)
class Repo:
    """A folder of a repo at one commit."""

    origin: Origin

    sizes: Mapping[str, int]
    """Name → size in bytes, of every file of the whole repo."""

    get: Fetch = field(repr=False)

    absent: frozenset[str] = frozenset()
    """Files of the folder that the repo has and an offline cache does not."""

    @property
    def names(self) -> frozenset[str]:
        """Names of the folder's files, relative to it."""
        return inside(self.sizes, self.origin.source.folder)

    def folders_with(self, name: str) -> frozenset[str]:
        """Return the folders of the repo that hold a file of this name; the repo's own root is not one."""
        paths = (PurePosixPath(path) for path in self.sizes)
        return frozenset(str(path.parent) for path in paths if path.name == name and len(path.parts) > 1)

    def beside(self, folder: str) -> frozenset[str]:
        """Return the files of a sibling folder, relative to this one (``../folder/name``); none for the repo's root."""
        own = PurePosixPath(self.origin.source.folder)
        if not own.name:
            return frozenset()
        return frozenset(f"../{folder}/{name}" for name in inside(self.sizes, str(own.parent / folder)))

    def fetch(self, names: Collection[str]) -> Path:
        """Fetch files, and return the local directory of the folder.

        Raises:
            ResolveError: they cannot be downloaded, or are not in the cache and offline mode is on.
        """
        folder = self.origin.source.folder
        wanted = sorted(normpath(f"{folder}/{name}") if folder else name for name in names)
        root = self.get(wanted)
        # An offline cache returns its directory without saying what it lacks.
        missing = [name for name in wanted if not (root / name).is_file()]
        if missing:
            raise ResolveError(
                f"{self.origin.source}: {listing(missing)} not found in the local cache, and offline mode is on",
                hint="run once without --offline (and without HF_HUB_OFFLINE)",
            )
        return root / folder if folder else root


def sizes_below(root: Path) -> dict[str, int]:
    """Return relative path → size in bytes, of every file below a directory."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()
    }


def inside(names: Collection[str], folder: str) -> frozenset[str]:
    """Return the paths that are in a folder, relative to it.

    Example:
        >>> inside(["a/x", "b/y"], "a"), inside(["a/x"], "")
        (frozenset({'x'}), frozenset({'a/x'}))
    """
    prefix = f"{folder}/" if folder else ""
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
