"""Repos of the Hugging Face Hub and of ModelScope → local directories. The only place that speaks to a network.

Files lie in the hub's own cache; its own package downloads, retries and resumes. Only what is asked for is fetched.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import TYPE_CHECKING, Any, TypeVar

from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.core.report import Observer
from lora_merge.core.source import Origin, Source
from lora_merge.errors import ResolveError
from lora_merge.redaction import without_secrets
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Iterator


T = TypeVar("T")

Fetch = Callable[[Collection[str]], Path]
"""Names in a repo → the directory that they lie in afterwards, under their names."""

_PATIENCE_SECONDS = 5.0  # for downloads to stop after an interrupt; they look after every block
_SNAPSHOT_BAR = "huggingface_hub.snapshot_download"
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


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
        return _inside(self.sizes, self.origin.source.folder)

    def folders_with(self, name: str) -> frozenset[str]:
        """Return the folders of the repo that hold a file of this name."""
        paths = (PurePosixPath(path) for path in self.sizes)
        return frozenset(str(path.parent) for path in paths if path.name == name and len(path.parts) > 1)

    def beside(self, folder: str) -> frozenset[str]:
        """Return the files of a folder next to this one, relative to this one; nothing for the repo itself."""
        own = PurePosixPath(self.origin.source.folder)
        if not own.name:
            return frozenset()
        return frozenset(f"../{folder}/{name}" for name in _inside(self.sizes, str(own.parent / folder)))

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


def open_repo(source: Source, access: Access, watch: Observer) -> Repo:
    """Return what a source is; nothing but a listing is asked for.

    Args:
        source: the repo, its folder and its revision.
        access: the token, and whether anyone may be asked at all.
        watch: hears of downloads.

    Raises:
        ResolveError: there is no such repo, revision or folder, or it cannot be reached.
    """
    opener = _open_modelscope if source.host == "ms" else _open_hub
    repo = opener(source, access, watch)
    if source.folder and not repo.names:
        holders = sorted(repo.folders_with(ADAPTER_CONFIG))
        hint = f"adapters are in its folders {', '.join(holders[:8])}" if holders else "check the spelling"
        raise ResolveError(f"{source}: the repo has no folder {source.folder}", hint=hint)
    return repo


def _open_hub(source: Source, access: Access, watch: Observer) -> Repo:
    import huggingface_hub
    from huggingface_hub import constants

    if access.offline or constants.HF_HUB_OFFLINE:
        return _open_cached(source)
    api = huggingface_hub.HfApi(token=access.token, library_name="lora-merge")
    with _hub_errors(source, access):
        info = api.model_info(source.repo, revision=source.revision, files_metadata=True)
    commit = str(info.sha)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    fetch = _HubFetch(source, commit, sizes, access, watch)
    anchors = [anchor for anchor in _anchors(source) if anchor in sizes]
    if anchors:
        fetch.remember(anchors)
    return Repo(Origin(source, commit), sizes, fetch)


@dataclass(frozen=True, slots=True)
class _HubFetch:
    """Downloads of one commit of a repo of the Hub."""

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
        if absent:
            self.watch.phase(f"downloading {self.source}", sum(self.sizes.get(name, 0) for name in absent))
        return self._download(names, self.commit)

    def remember(self, names: Collection[str]) -> None:
        """Download by the revision's own name, so that the cache knows later what it stood for.

        Raises:
            ResolveError: it stands for another commit by now.
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
                    allow_patterns=[glob.escape(name) for name in names],
                    token=self.access.token,
                    library_name="lora-merge",
                    tqdm_class=bar,
                )
            )

        with _hub_errors(self.source, self.access):
            return Path(_interruptible(work, stop))


class _StoppedError(Exception):
    """A download was asked to stop."""


def _bar(watch: Observer, stop: threading.Event) -> type[Any]:
    """Return a progress bar for `snapshot_download` that shows nothing and tells an observer."""
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]  # a class without annotations
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("name") == _SNAPSHOT_BAR
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if stop.is_set():
                raise _StoppedError
            if self._counts_bytes and n:
                with lock:
                    watch.advance(int(n))

    return Bar


def _interruptible(work: Callable[[], T], stop: threading.Event) -> T:
    """Return what work returns. An interrupt does not wait for its downloads; it stops them.

    Raises:
        KeyboardInterrupt: as it came.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - raised again where it is waited for
            outcome.set_exception(exc)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        stop.set()
        thread.join(_PATIENCE_SECONDS)
        raise


def _open_cached(source: Source) -> Repo:
    """Return what the cache of the Hub has of a source.

    Raises:
        ResolveError: nothing.
    """
    root = _cached_root(source)
    if root is None:
        local = "" if source.explicit else "there is no such directory, and it "
        raise ResolveError(
            f"{source}: {local}is not in the local cache at revision {source.wanted}, and the hub may not be asked",
            hint="run once without --offline (and without HF_HUB_OFFLINE), or pass a directory",
        )
    sizes = _walk(root)
    absent = _inside(_cached_listing(source, root.name), source.folder) - _inside(sizes, source.folder)
    return Repo(Origin(source, root.name), sizes, lambda _: root, absent)


def _cached_root(source: Source) -> Path | None:
    """Return the directory of a revision in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for anchor in _anchors(source):
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


def _anchors(source: Source) -> tuple[str, ...]:
    """Return the files one of which a directory of this source must have."""
    return tuple(
        f"{source.folder}/{name}" if source.folder else name for name in (CONFIG_FILE, ADAPTER_CONFIG)
    )


@contextlib.contextmanager
def _hub_errors(source: Source, access: Access) -> Iterator[None]:
    """Turn the errors of huggingface_hub into one sentence each.

    Raises:
        ResolveError: whatever went wrong.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as exc:  # it hides why a file could not be had
        raise _said(source, exc.__cause__ or exc, access) from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as exc:
        raise _said(source, exc, access) from None  # it holds the request, and that the token


def _said(source: Source, exc: BaseException, access: Access) -> ResolveError:
    """Return the error for one of huggingface_hub, which may quote the token."""
    error = _hub_error(source, exc)
    return ResolveError(without_secrets(str(error), [access.token]), hint=error.hint)


def _hub_error(source: Source, exc: BaseException) -> ResolveError:
    from huggingface_hub import errors

    status = getattr(getattr(exc, "response", None), "status_code", 0)
    pass_token = "pass --token, set HF_TOKEN or run `hf auth login`"  # noqa: S105 - advice
    if isinstance(exc, errors.GatedRepoError) or (status == 403 and not _named(exc, "Disabled")):
        sentence = "is gated or private, and access was not granted"
        hint = f"accept its licence at https://huggingface.co/{source.repo}, then {pass_token}"
    elif isinstance(exc, errors.RevisionNotFoundError):
        sentence = f"the repo has no revision {source.wanted}"
        hint = "a folder stands before the @: org/name/FOLDER@REVISION" if "/" in source.wanted else ""
    elif isinstance(exc, errors.RepositoryNotFoundError):
        local = "" if source.explicit else "there is no such directory, and "
        sentence = f"{local}the Hub has no such repo, or it is private"
        hint = f"check the spelling; for a private repo {pass_token}"
    elif status == 401:
        sentence, hint = "the Hub does not accept the token", f"{pass_token} anew"
    elif status:
        sentence, hint = f"the Hub answered with status {status}", "try again later; what was fetched is kept"
    elif isinstance(exc, errors.HTTPError | errors.OfflineModeIsEnabled):
        return _unreachable(source, exc)
    else:
        return _not_stored(source, exc)
    return ResolveError(f"{source}: {sentence}", hint=hint)


def _unreachable(source: Source, exc: BaseException) -> ResolveError:
    root = _cached_root(source)
    hint = "check the network, proxies and HF_ENDPOINT; files that were fetched whole are kept"
    if root is not None:
        hint = f"commit {root.name} of it is in the local cache: --offline takes what is there"
    local = "" if source.explicit else "there is no such directory, and "
    return ResolveError(f"{source}: {local}the Hub cannot be reached ({type(exc).__name__})", hint=hint)


def _not_stored(source: Source, exc: BaseException) -> ResolveError:
    """Return the error of a download that failed on this side, or came short."""
    if isinstance(exc, OSError) and exc.errno in _DISK_ERRORS:
        hint = "the cache is in ~/.cache/huggingface; HF_HOME moves it to another disk"
        return ResolveError(f"{source}: cannot be stored in the cache ({exc.strerror})", hint=hint)
    reason = str(exc).strip().partition("\n")[0]
    return ResolveError(f"{source}: the download failed ({reason})", hint="run again; whole files are kept")


def _open_modelscope(source: Source, access: Access, watch: Observer) -> Repo:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError as exc:
        raise ResolveError(
            f"{source}: is on ModelScope, and the package modelscope is not installed",
            hint="pip install 'lora-merge[modelscope]'",
        ) from exc
    if access.offline:
        with _modelscope_errors(source):
            root = Path(snapshot_download(source.repo, revision=source.revision, local_files_only=True))
        return Repo(Origin(source), _walk(root), lambda _: root)
    with _modelscope_errors(source):
        listing = HubApi().get_model_files(source.repo, revision=source.wanted, recursive=True)
    sizes = {file["Path"]: int(file.get("Size") or 0) for file in listing if file.get("Type") != "tree"}
    folders = {str(parent) for name in sizes for parent in PurePosixPath(name).parents}
    sizes = {name: size for name, size in sizes.items() if name not in folders}

    def get(names: Collection[str]) -> Path:
        watch.phase(f"downloading {source}", sum(sizes.get(name, 0) for name in names))
        stop = threading.Event()

        def work() -> str:
            patterns = [glob.escape(name) for name in names]
            progress = [_modelscope_progress(watch, stop)]
            return str(
                snapshot_download(
                    source.repo,
                    revision=source.wanted,
                    allow_patterns=patterns,
                    progress_callbacks=progress,
                )
            )

        with _modelscope_errors(source):
            return Path(_interruptible(work, stop))

    return Repo(Origin(source), sizes, get)


def _modelscope_progress(watch: Observer, stop: threading.Event) -> type[Any]:
    """Return a class of what ModelScope tells of each file's bytes."""
    lock = threading.Lock()

    class Progress:
        def __init__(self, filename: str, file_size: int) -> None:
            del filename, file_size

        def update(self, size: int) -> None:
            if stop.is_set():
                raise _StoppedError
            with lock:
                watch.advance(size)

        def end(self) -> None:
            pass

    return Progress


@contextlib.contextmanager
def _modelscope_errors(source: Source) -> Iterator[None]:
    """Turn the errors of modelscope, which have no common root, into one sentence each.

    Raises:
        ResolveError: whatever went wrong.
    """
    try:
        yield
    except Exception as exc:  # noqa: BLE001 - they have no common root
        status = getattr(getattr(exc, "response", None), "status_code", 0)
        sentence, hint = f"cannot be fetched from ModelScope ({type(exc).__name__})", "run again"
        if _named(exc, "CacheNotFound") or isinstance(exc, ValueError):
            sentence, hint = "is not in ModelScope's local cache", "run once without --offline"
        elif _named(exc, "NotExist") or status == 404:
            sentence = f"ModelScope has no such repo, or it has no revision {source.wanted}, or it is private"
            hint = "check the spelling; for a private repo set MODELSCOPE_API_TOKEN"
        elif _named(exc, "Authentication", "PermissionDenied", "NotLogin") or status in {401, 403}:
            sentence, hint = "ModelScope does not grant access", "set MODELSCOPE_API_TOKEN"
        elif _named(exc, "Connection", "Network", "Timeout"):
            sentence, hint = (
                "ModelScope cannot be reached",
                "check the network; --offline takes what is cached",
            )
        raise ResolveError(f"{source}: {sentence}", hint=hint) from None


def _named(exc: BaseException, *words: str) -> bool:
    """Return True when the class of an error, or of one that it came from, has such a name."""
    chain: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return any(word in kind.__name__ for error in chain for kind in type(error).__mro__ for word in words)


def _walk(root: Path) -> dict[str, int]:
    return {
        path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()
    }


def _inside(names: Collection[str], folder: str) -> frozenset[str]:
    prefix = f"{folder}/" if folder else ""
    return frozenset(name.removeprefix(prefix) for name in names if name.startswith(prefix))
