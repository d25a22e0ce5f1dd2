"""The Hugging Face Hub, through the package huggingface_hub and its cache."""

from __future__ import annotations

import glob
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge.core.report import Observer
from lora_merge.errors import ResolveError
from lora_merge.storage.hub.cache import anchors_of, open_cached
from lora_merge.storage.hub.downloads import StoppedError, interruptible
from lora_merge.storage.hub.hub_errors import hub_errors
from lora_merge.storage.hub.repo import Access, Repo
from lora_merge.storage.source import Origin, Source

_SNAPSHOT_BAR = "huggingface_hub.snapshot_download"


def open_hub(source: Source, access: Access, watch: Observer) -> Repo:
    """Return a repo of the Hub at the commit that its revision means now; offline, what the cache holds of it.

    Raises:
        ResolveError: there is no such repo or revision, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import constants

    if access.offline or constants.HF_HUB_OFFLINE:
        return open_cached(source)
    api = huggingface_hub.HfApi(token=access.token, library_name="lora-merge")
    with hub_errors(source, access):
        info = api.model_info(source.repo, revision=source.revision, files_metadata=True)
    # Everything is fetched at this commit, so a push in between cannot mix two versions.
    commit = str(info.sha)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    fetch = _HubFetch(source, commit, sizes, access, watch)
    anchors = [anchor for anchor in anchors_of(source) if anchor in sizes]
    # The small config files are fetched by the branch's name; the cache then records which commit it means.
    if anchors:
        fetch.remember(anchors)
    return Repo(Origin(source, commit), sizes, fetch)


@dataclass(frozen=True, slots=True)
class _HubFetch:
    """Downloads files of one commit of a repo."""

    source: Source
    commit: str
    sizes: Mapping[str, int]
    access: Access
    watch: Observer

    def __call__(self, names: Collection[str]) -> Path:
        from huggingface_hub import try_to_load_from_cache

        absent = [
            name
            for name in names
            if not isinstance(try_to_load_from_cache(self.source.repo, name, revision=self.commit), str)
        ]
        # A phase is shown only when something is downloaded.
        if absent:
            self.watch.phase(f"downloading {self.source}", sum(self.sizes.get(name, 0) for name in absent))
        return self._download(names, self.commit)

    def remember(self, names: Collection[str]) -> None:
        """Download files by the revision's name, so that the cache records which commit it means, for --offline
        later.

        Raises:
            ResolveError: the name means another commit by now.
        """
        if self._download(names, self.source.revision).name != self.commit:
            raise ResolveError(f"{self.source}: changed while it was being read", hint="run again")

    def _download(self, names: Collection[str], revision: str | None) -> Path:
        from huggingface_hub import snapshot_download

        stop = threading.Event()
        bar = _bar(self.watch, stop)

        def work() -> str:
            return str(
                snapshot_download(
                    self.source.repo,
                    revision=revision,
                    # The parameter takes patterns, and names may hold brackets.
                    allow_patterns=[glob.escape(name) for name in names],
                    token=self.access.token,
                    library_name="lora-merge",
                    tqdm_class=bar,
                )
            )

        with hub_errors(self.source, self.access):
            return Path(interruptible(work, stop))


def _bar(watch: Observer, stop: threading.Event) -> type[Any]:
    """Return a class for `snapshot_download`'s progress bar that draws nothing, reports bytes to an observer and can
    be stopped.
    """
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]  # a class without annotations
        def __init__(self, *args: Any, **options: Any) -> None:
            # Of the package's bars (files, transfers, bytes) this one counts what is written to the disk.
            self._counts_bytes = options.get("name") == _SNAPSHOT_BAR
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            # The package calls this after every block: an exception here ends the download.
            if stop.is_set():
                raise StoppedError
            if self._counts_bytes and n:
                with lock:
                    watch.advance(int(n))

    return Bar
