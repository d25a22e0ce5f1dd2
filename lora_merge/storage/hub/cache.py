"""The Hugging Face Hub's local cache: what it holds of a repo, and what it knows to be missing."""

from __future__ import annotations

from pathlib import Path

from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.errors import ResolveError
from lora_merge.storage.hub.repo import Repo, inside, sizes_below
from lora_merge.storage.source import Origin, Source


def open_cached(source: Source) -> Repo:
    """Return the part of a repo that the Hub's cache holds.

    Raises:
        ResolveError: the cache has nothing of it.
    """
    root = cached_root(source)
    if root is None:
        local = "" if source.explicit else "this directory does not exist, and the repo is "
        raise ResolveError(
            f"{source}: {local}not found in the local cache (revision {source.wanted}), and offline mode is on",
            hint="run once without --offline (and without HF_HUB_OFFLINE), or pass a directory",
        )
    sizes = sizes_below(root)
    # Known only where the cache keeps a listing of the commit.
    absent = inside(_cached_listing(source, root.name), source.folder) - inside(sizes, source.folder)
    return Repo(Origin(source, root.name), sizes, lambda _: root, absent)


def cached_root(source: Source) -> Path | None:
    """Return the snapshot directory of a revision in the Hub's cache; None where it holds neither kind of config."""
    from huggingface_hub import try_to_load_from_cache

    for anchor in anchors_of(source):
        found = try_to_load_from_cache(source.repo, anchor, revision=source.revision)
        if isinstance(found, str):
            # The snapshot's directory, however deep the folder of the source is in it.
            return Path(found).parents[anchor.count("/")]
    return None


def _cached_listing(source: Source, commit: str) -> frozenset[str]:
    """Return the files of a commit that the cache knows of, fetched or not; empty where it keeps no listing."""
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
    """Return file names; a source must have one of them: a model's config, or an adapter's."""
    return tuple(
        f"{source.folder}/{name}" if source.folder else name for name in (CONFIG_FILE, ADAPTER_CONFIG)
    )
