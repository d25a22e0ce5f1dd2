"""The cache of the Hugging Face Hub: what it has of a repo, and what it knows to be missing."""

from __future__ import annotations

from pathlib import Path

from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.errors import ResolveError
from lora_merge.storage.hub.repo import Repo, inside, sizes_below
from lora_merge.storage.source import Origin, Source


def open_cached(source: Source) -> Repo:
    """Return what the cache of the Hub has of a source.

    Raises:
        ResolveError: nothing.
    """
    root = cached_root(source)
    if root is None:
        local = "" if source.explicit else "there is no such directory, and it "
        raise ResolveError(
            f"{source}: {local}is not in the local cache at revision {source.wanted}, and the hub may not be asked",
            hint="run once without --offline (and without HF_HUB_OFFLINE), or pass a directory",
        )
    sizes = sizes_below(root)
    absent = inside(_cached_listing(source, root.name), source.folder) - inside(sizes, source.folder)
    return Repo(Origin(source, root.name), sizes, lambda _: root, absent)


def cached_root(source: Source) -> Path | None:
    """Return the directory of a revision in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for anchor in anchors_of(source):
        found = try_to_load_from_cache(source.repo, anchor, revision=source.revision)
        if isinstance(found, str):
            return Path(found).parents[anchor.count("/")]
    return None


def _cached_listing(source: Source, commit: str) -> frozenset[str]:
    """Return what the cache knows to be in a commit, here or not; nothing where it knows nothing."""
    import huggingface_hub
    from huggingface_hub import errors

    if not hasattr(huggingface_hub, "get_cached_repo_tree"):  # before 2.0
        return frozenset()
    try:
        tree = huggingface_hub.get_cached_repo_tree(source.repo, revision=commit)
    except errors.CachedRepoTreeNotFoundError:
        return frozenset()
    return frozenset(file.path for file in tree)


def anchors_of(source: Source) -> tuple[str, ...]:
    """Return the files one of which a directory of this source must have."""
    return tuple(
        f"{source.folder}/{name}" if source.folder else name for name in (CONFIG_FILE, ADAPTER_CONFIG)
    )
