"""ModelScope, through the package modelscope (an extra) and its cache."""

from __future__ import annotations

import contextlib
import glob
import threading
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lora_merge.errors import ResolveError
from lora_merge.storage.hub.downloads import StoppedError, interruptible, is_named
from lora_merge.storage.hub.repo import Access, Repo, sizes_below
from lora_merge.storage.source import Origin, Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.report import Observer


def open_modelscope(source: Source, access: Access, watch: Observer) -> Repo:
    """Return a repo of ModelScope; it tells no commit.

    Raises:
        ResolveError: there is no such repo or revision, it cannot be reached, or the package modelscope is not installed.
    """
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as exc:
        raise ResolveError(
            f"{source}: is on ModelScope, but the package modelscope is not installed",
            hint="run pip install 'lora-merge[modelscope]'",
        ) from exc
    if access.offline:
        with _errors(source):
            root = Path(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
        return Repo(Origin(source), sizes_below(root), lambda _: root)
    with _errors(source):
        listing = HubApi().get_model_files(source.repo, revision=source.wanted, recursive=True)
    sizes = {file["Path"]: int(file.get("Size") or 0) for file in listing if file.get("Type") != "tree"}
    # A name that other names are below is a folder, whatever its type says.
    folders = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    sizes = {name: size for name, size in sizes.items() if name not in folders}

    def get(names: Collection[str]) -> Path:
        watch.phase(f"downloading {source}", sum(sizes.get(name, 0) for name in names))
        stop = threading.Event()

        def work() -> str:
            patterns = [glob.escape(name) for name in names]
            # As a class: ModelScope makes an object for each file.
            progress = [_progress(watch, stop)]
            return str(
                snapshot_download(
                    source.repo,
                    revision=source.wanted,
                    allow_patterns=patterns,
                    progress_callbacks=progress,
                )
            )

        with _errors(source):
            return Path(interruptible(work, stop))

    return Repo(Origin(source), sizes, get)


def _progress(watch: Observer, stop: threading.Event) -> type[Any]:
    """Return a callback class for ModelScope that reports bytes to an observer and can be stopped."""
    lock = threading.Lock()

    class Progress:
        def __init__(self, filename: str, file_size: int) -> None:
            del filename, file_size

        def update(self, size: int) -> None:
            if stop.is_set():
                raise StoppedError
            with lock:
                watch.advance(size)

        def end(self) -> None:
            pass

    return Progress


@contextlib.contextmanager
def _errors(source: Source) -> Iterator[None]:
    """Turn errors of the package modelscope into one sentence each. They have no common base class.

    Raises:
        ResolveError: for each of them.
    """
    try:
        yield
    except Exception as exc:  # noqa: BLE001 - they have no common root
        status = getattr(getattr(exc, "response", None), "status_code", 0)
        sentence, hint = f"the download from ModelScope failed ({type(exc).__name__})", "run again"
        # With ``local_files_only`` the package raises a plain ValueError.
        if is_named(exc, "CacheNotFound") or isinstance(exc, ValueError):
            sentence, hint = (
                "not found in ModelScope's local cache, and offline mode is on",
                "run once without --offline",
            )
        elif is_named(exc, "NotExist") or status == 404:
            sentence = f"ModelScope has no such repo, or it has no revision {source.wanted}, or it is private"
            hint = "check the spelling; for a private repo set MODELSCOPE_API_TOKEN"
        elif is_named(exc, "Authentication", "PermissionDenied", "NotLogin") or status in {401, 403}:
            sentence, hint = "ModelScope refused access", "set MODELSCOPE_API_TOKEN"
        elif is_named(exc, "Connection", "Network", "Timeout"):
            sentence, hint = (
                "ModelScope cannot be reached",
                "check the network, or pass --offline to use the local cache",
            )
        raise ResolveError(f"{source}: {sentence}", hint=hint) from None
