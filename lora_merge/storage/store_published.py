"""Outputs in a store that are complete: how a run knows, what it sees of them, and what is removed beside them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import ResolveError, WriteError
from lora_merge.storage.destination import Published
from lora_merge.storage.objects import store_at
from lora_merge.storage.store_staging import StoreStaging

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.storage.objects.urls import StoreUrl


def is_complete(url: StoreUrl) -> bool:
    """Return True when an output has its ``config.json``.

    Raises:
        LoraMergeError: the store cannot be asked.
    """
    if store_at(url).entry(CONFIG_FILE) is None:
        return False
    staging = StoreStaging(url)
    # Without the mark, a configuration beside a lock is that of an older output, which the run has not removed yet.
    return staging.sealed() is not None or staging.run() is None


def published(url: StoreUrl, manifest: str) -> Published:
    """Return the manifest of an output, and the sizes of its files.

    Raises:
        LoraMergeError: the store cannot be asked, or there is no manifest.
    """
    store = store_at(url)
    entries = store.entries()
    made = entries[manifest].modified if manifest in entries else 0
    sizes = {name: entry.nbytes for name, entry in entries.items()}
    return Published(store.get(manifest), sizes, int(made * 10**9))


def clear_spent(url: StoreUrl) -> None:
    """Remove files of an older output, and staging, where a killed run has left nothing to do but this."""
    staging = StoreStaging(url)
    with contextlib.suppress(WriteError, ResolveError):
        old = staging.sealed()
        if old is not None and store_at(url).entry(CONFIG_FILE) is not None:
            finish(url, staging, old)


def finish(url: StoreUrl, staging: StoreStaging, old: Collection[str]) -> None:
    """Remove what is left beside a complete output: files of an older one, and staging.

    Raises:
        WriteError: the store refused it.
    """
    store_at(url).delete(sorted(old))
    staging.clear()
