"""A base on the Hugging Face Hub whose weights are read where they are: only its small files are downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from posixpath import normpath
from typing import TYPE_CHECKING

from lora_merge.errors import ResolveError
from lora_merge.storage import input_files
from lora_merge.storage.at_once import of_each
from lora_merge.storage.hub.hub_files import HUB_FILES
from lora_merge.storage.hub.remote_file import use_token
from lora_merge.storage.local_copies import LocalCopy, enlist, not_copied, text_below
from lora_merge.storage.objects.store import Entry
from lora_merge.storage.source import HubFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.identity import FileIdentity
    from lora_merge.storage.hub.repo import Access, Repo
    from lora_merge.storage.source import Source


class _RepoFolder:
    """A folder of a repo at a commit (a `local_copies.Far`).

    Args:
        repo: the folder, with its listing.
    """

    def __init__(self, repo: Repo) -> None:
        self._repo = repo
        source = repo.origin.source
        self.text = str(HubFile(source.repo, repo.origin.commit, source.folder)).rstrip("/")

    def beside(self, folder: str) -> Mapping[str, Entry]:
        """Return the files of a sibling folder, by their names in it."""
        start = f"../{folder}/"
        return {name.removeprefix(start): Entry(0, "") for name in self._repo.beside(folder)}

    def bring(self, names: Sequence[str], root: Path, entries: Mapping[str, Entry]) -> list[FileIdentity]:  # noqa: ARG002 - the cache knows sizes
        """Download files into the Hub's cache, and copy them from there; return the version of each.

        Raises:
            ResolveError: one cannot be downloaded, or the disk is full.
            ChangedError: one has disappeared meanwhile.
        """
        cached = self._repo.fetch(names)
        for name in names:
            path = Path(normpath(root / name))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                # The cache has links, and a link that leads out of a model's folder is not followed.
                shutil.copyfile(cached / name, path)
            except OSError as exc:
                raise not_copied(text_below(self.text, name), exc) from exc
        try:
            return of_each(HUB_FILES.version_at, [text_below(self.text, name) for name in names])
        except FileNotFoundError as exc:
            raise input_files.changed(str(exc.filename), "disappeared while it was read") from None


def check_online(source: Source, access: Access) -> None:
    """Check that the Hub may be asked for a base whose weights are read there.

    Raises:
        ResolveError: offline mode is on.
    """
    from huggingface_hub import constants

    if access.offline or constants.HF_HUB_OFFLINE:
        sentence = f"{source}: offline mode is on, and --stream-base reads the base from the Hub"
        raise ResolveError(sentence, hint="leave out --stream-base, or --offline and HF_HUB_OFFLINE")


def streamed(repo: Repo, access: Access) -> LocalCopy:
    """Return the local copy of a repo's folder: small files are fetched into it, and all others are read by ranges.

    Args:
        repo: the folder.
        access: how the Hub may be asked for it.
    """
    source = repo.origin.source
    use_token(source.repo, access.token)
    sizes = {name: repo.sizes[f"{source.folder}/{name}" if source.folder else name] for name in repo.names}
    return enlist(LocalCopy(_RepoFolder(repo), {name: Entry(size, "") for name, size in sizes.items()}))
