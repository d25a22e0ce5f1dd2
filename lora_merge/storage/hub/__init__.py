"""Repos of the Hugging Face Hub and of ModelScope → local directories. The only place that uses a network.

Files are in the hub's own cache; its own package downloads, retries and resumes. Only what is asked for is fetched. Weights
of a base may stay where they are: then they are read by ranges, at one commit (`remote_file`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.errors import ResolveError
from lora_merge.storage.hub.huggingface import open_hub
from lora_merge.storage.hub.modelscope import open_modelscope
from lora_merge.storage.hub.repo import Access, Repo
from lora_merge.storage.hub.streamed import check_online, streamed
from lora_merge.words import listing

if TYPE_CHECKING:
    from lora_merge.core.report import Observer
    from lora_merge.storage.local_copies import LocalCopy
    from lora_merge.storage.source import Source

__all__ = ["Access", "Repo", "open_repo", "open_streamed"]


def open_repo(source: Source, access: Access, watch: Observer) -> Repo:
    """Return the repo that a source names. Only its listing is asked for, no weights.

    Args:
        source: the repo, its folder and its revision.
        access: the token, and whether anyone may be asked at all.
        watch: hears of downloads.

    Raises:
        ResolveError: there is no such repo, revision or folder, or it cannot be reached.
    """
    opener = open_modelscope if source.host == "ms" else open_hub
    return _with_folder(opener(source, access, watch))


def open_streamed(source: Source, access: Access, watch: Observer) -> tuple[Repo, LocalCopy]:
    """Return a folder of a repo of the Hugging Face Hub whose weights are read where they are, and its local copy.

    Args:
        source: the repo, its folder and its revision.
        access: the token.
        watch: hears of downloads of small files.

    Raises:
        ResolveError: there is no such repo, revision or folder, or offline mode is on.
    """
    check_online(source, access)
    repo = _with_folder(open_hub(source, access, watch))
    return repo, streamed(repo, access)


def _with_folder(repo: Repo) -> Repo:
    """Check that a repo has the folder that its source names, and return it.

    Raises:
        ResolveError: it has not.
    """
    source = repo.origin.source
    if source.folder and not repo.names:
        holders = sorted(repo.folders_with(ADAPTER_CONFIG))
        hint = (
            f"name a folder that has an adapter: {listing(holders, 8)}" if holders else "check the spelling"
        )
        raise ResolveError(f"{source}: the repo has no folder {source.folder}", hint=hint)
    return repo
