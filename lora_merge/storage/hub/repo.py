"""A repo of any hub: what is in it, and its files once they are fetched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath

from lora_merge.errors import ResolveError
from lora_merge.storage.source import Origin
from lora_merge.words import listing

Fetch = Callable[[Collection[str]], Path]
"""Names in a repo → the directory that they lie in afterwards, under their names."""


@dataclass(frozen=True, slots=True)
class Access:
    """How a hub may be asked."""

    token: str | None = field(default=None, repr=False)
    """For the Hugging Face Hub; None leaves it to ``HF_TOKEN`` and the login."""

    offline: bool = False


@dataclass(frozen=True, slots=True)
class Repo:
    """A folder of a repo at one commit: what is in it, and its files once they are fetched."""

    origin: Origin

    sizes: Mapping[str, int]
    """Bytes of every file of the repo."""

    get: Fetch = field(repr=False)

    absent: frozenset[str] = frozenset()
    """Files that the repo has and an offline cache has not, by their names in the folder."""

    @property
    def names(self) -> frozenset[str]:
        """Return the files of the folder, relative to it."""
        return inside(self.sizes, self.origin.source.folder)

    def folders_with(self, name: str) -> frozenset[str]:
        """Return the folders of the repo that hold a file of this name."""
        paths = (PurePosixPath(path) for path in self.sizes)
        return frozenset(str(path.parent) for path in paths if path.name == name and len(path.parts) > 1)

    def beside(self, folder: str) -> frozenset[str]:
        """Return the files of a folder next to this one, relative to this one; nothing for the repo itself."""
        own = PurePosixPath(self.origin.source.folder)
        if not own.name:
            return frozenset()
        return frozenset(f"../{folder}/{name}" for name in inside(self.sizes, str(own.parent / folder)))

    def fetch(self, names: Collection[str]) -> Path:
        """Return the local directory of the folder, once these files are in it.

        Raises:
            ResolveError: they cannot be downloaded, or are not in the cache and the hub may not be asked.
        """
        folder = self.origin.source.folder
        wanted = sorted(normpath(f"{folder}/{name}") if folder else name for name in names)
        root = self.get(wanted)
        missing = [name for name in wanted if not (root / name).is_file()]
        if missing:
            raise ResolveError(
                f"{self.origin.source}: lacks {listing(missing)} in the local cache",
                hint="run once without --offline (and without HF_HUB_OFFLINE)",
            )
        return root / folder if folder else root


def sizes_below(root: Path) -> dict[str, int]:
    """Return the bytes of every file below a directory, by its path in it."""
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()
    }


def inside(names: Collection[str], folder: str) -> frozenset[str]:
    """Return those of some paths that are in a folder, relative to it.

    Example:
        >>> inside(["a/x", "b/y"], "a"), inside(["a/x"], "")
        (frozenset({'x'}), frozenset({'a/x'}))
    """
    prefix = f"{folder}/" if folder else ""
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
