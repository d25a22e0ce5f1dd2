"""Texts → local directories: a directory of that name, or what is fetched of a repo or a store, small files first."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.adapters import FORMATS
from lora_merge.core.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLED_FILE,
    PICKLED_INDEX_FILE,
    SAFETENSORS_FILE,
)
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.errors import CheckpointError, RequestError, ResolveError, UnsupportedError
from lora_merge.formats.repo_files import (
    EXTRA_FOLDER,
    adapter_copies,
    adapter_small,
    adapter_weights,
    base_small,
    base_weights,
)
from lora_merge.formats.side_files import CARD_FILE, MANIFEST_FILE, belongs_to_adapter, belongs_to_base
from lora_merge.formats.trainer_files import chosen, described, file_names, unread_files
from lora_merge.planning.base_names import named_bases
from lora_merge.storage.hub import Access, Repo, open_repo, open_streamed
from lora_merge.storage.local_copies import LocalCopy
from lora_merge.storage.objects.local_copies import local_copy
from lora_merge.storage.objects.urls import StoreUrl, is_store_url, parse_store_url
from lora_merge.storage.paths import file_hint, missing_hint
from lora_merge.storage.shown import by_url
from lora_merge.storage.source import Source, parse_source, unread_kind
from lora_merge.storage.user_paths import is_directory, real_path, user_path
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from lora_merge.core.report import Observer
    from lora_merge.storage.source import Origin

Found = Path | Source | StoreUrl


@dataclass(frozen=True, slots=True)
class Place:
    """Where a base or an adapter is."""

    text: str
    """As the user or the adapter named it."""

    root: Path
    """The local directory; of a repo, only the small files are in it at first."""

    repo: Repo | None = None
    """None for what is not in a repo."""

    weights: frozenset[str] = frozenset()
    """Files of the repo or the store that are still to be fetched."""

    issues: tuple[Issue, ...] = ()

    ignored: frozenset[str] = frozenset()
    """Files of an adapter that the user wants left out."""

    copy: LocalCopy | None = None
    """What of a store is on this machine; None for what is in no store. The files are there as long as this is."""

    @property
    def is_remote(self) -> bool:
        """True where small files are here before anything large is."""
        return self.repo is not None or self.copy is not None

    @property
    def label(self) -> str:
        """The directory's path, or the URL of what it is the copy of."""
        return by_url(str(self.root))

    @property
    def prefix(self) -> str:
        """What the texts of a base's weight files begin with, where they are in a store; else empty."""
        return self.copy.text if self.copy is not None else ""

    @property
    def origin(self) -> Origin | None:
        """The source and its commit; None for a local directory."""
        return self.repo.origin if self.repo else None

    def whole(self) -> Path:
        """Return the directory with the weights in it, which are fetched now.

        Raises:
            ResolveError: they cannot be fetched.
        """
        if self.copy is not None:
            return self.copy.fetch(self.weights)
        return self.repo.fetch(self.weights) if self.repo else self.root


def find(text: str, role: str) -> Found:
    """Return the directory of this name, or the source that the text means.

    A directory wins over a repo, and a URL of a store over a directory.

    Raises:
        RequestError: it is a URL of a store, and a wrong one.
        ResolveError: it is neither, or a directory that cannot be read.
        UnsupportedError: it is a base whose name says that it is stored in a way that is not read.

    Args:
        text: as the user or an adapter has it.
        role: ``"base"`` or ``"adapter"``, for messages.
    """
    url = parse_store_url(text)
    if url is not None:
        return url
    root = user_path(text)
    try:
        exists = root.exists()
    except OSError as exc:  # a folder on its way may not be searched, or the name is too long
        raise ResolveError(f"{text}: cannot be read ({(exc.strerror or str(exc)).lower()})") from exc
    # A link that leads nowhere was meant as a path, so no hub is asked for it.
    source = None if exists or root.is_symlink() else parse_source(text)
    if source is not None:
        if role == "base":
            _refuse_unread(source)
        return source
    if root.is_dir():
        if not os.access(root, os.R_OK | os.X_OK):
            raise ResolveError(f"{text}: cannot be read (permission denied)")
        return real_path(root)
    if exists:
        raise ResolveError(f"{text}: is a file, expected a directory with the {role}", hint=file_hint(root))
    raise ResolveError(f"{text}: this directory does not exist", hint=missing_hint(text, role))


def check_not_swapped(base: Found, adapter: Found) -> None:
    """Check that base and adapter were not named in each other's place.

    Raises:
        ResolveError: they were.
    """
    # What is in a repo is not known yet.
    if not (isinstance(base, Path) and isinstance(adapter, Path)):
        return
    kinds = [
        ((place / CONFIG_FILE).is_file(), (place / ADAPTER_CONFIG).is_file()) for place in (base, adapter)
    ]
    if kinds == [(False, True), (True, False)]:
        raise ResolveError(
            f"--base and --adapter are swapped: {base} is an adapter, and {adapter} is a model",
            hint=f"write --base {adapter} --adapter {base}",
        )


def locate_adapter(
    found: Found, text: str, access: Access, watch: Observer, ignore: Sequence[str] = ()
) -> Place:
    """Return where an adapter is, with its configuration and side files in reach.

    Args:
        found: its directory, its repo, or its place in a store.
        text: as the user named it.
        access: how a hub may be asked.
        watch: hears of downloads.
        ignore: names of files in it that the user wants left out.

    Raises:
        ResolveError: the repo or the store cannot be reached, or holds no adapter.
    """
    if isinstance(found, Path):
        return Place(text, found, ignored=chosen(file_names(found), ignore) if ignore else frozenset())
    repo = _opened(found, access, watch)
    # Adapters in subfolders, for a message: a repo may hold one per checkpoint.
    is_folder = isinstance(found, Source) and bool(found.folder)
    elsewhere = () if is_folder else repo.folders_with(ADAPTER_CONFIG)
    known = repo.names | repo.absent
    ignored = chosen(known, ignore)
    formats = {one.weights for one in FORMATS.values()}
    example = f"{found}/FOLDER" if isinstance(found, StoreUrl) else "org/name/FOLDER"
    small = adapter_small(str(found), known, elsewhere, formats, example)
    absent = frozenset(filter(belongs_to_adapter, repo.absent))
    # What is in the small files is checked before any weights are fetched.
    # A cache may lack the card, which is not needed to read the adapter.
    root = repo.fetch(small - absent - (repo.absent & {CARD_FILE}))
    weights = adapter_weights(known, formats, ignored) | repo.beside(EXTRA_FOLDER)
    copies = adapter_copies(known, ignored)
    # The listing suffices: a file that no reader would read is refused before it is fetched.
    unread = [
        error("unread-file", name, *described(name))
        for name in unread_files(known, weights | copies, ignored)
    ]
    sentence = "is a second copy of the adapter and was not downloaded; PEFT does not read it either"
    notes = [note("adapter-copy", name, sentence) for name in sorted(copies)]
    issues = (*_absent_issues(str(found), absent), *unread, *notes)
    return replace(_place(text, root, repo), weights=weights, issues=issues, ignored=ignored)


def check_ignored(places: Sequence[Place], ignore: Sequence[str]) -> None:
    """Check that each file that is to be ignored is there.

    Raises:
        RequestError: one is in none of the adapters.
    """
    found = frozenset().union(*(place.ignored for place in places))
    for name in ignore:
        if not chosen(found, [name]):
            sentence = f"no adapter has a file {name}; looked in {', '.join(place.text for place in places)}"
            raise RequestError(
                "", 0, "ignore_file", sentence, hint="leave the option out, or correct the name"
            )


def locate_base(found: Found, text: str, access: Access, watch: Observer) -> Place:
    """Return where a base is, with its configuration, side files and index on this machine.

    Raises:
        ResolveError: the repo or the store cannot be reached, or holds no model.
    """
    if access.stream_base:
        opened: Repo | LocalCopy
        repo: Repo | LocalCopy
        opened, repo = open_streamed(_streamable(found, text), access, watch)
    elif isinstance(found, Path):
        return Place(text, found)
    else:
        opened = repo = _opened(found, access, watch)
    known = repo.names | repo.absent
    if isinstance(repo, LocalCopy):
        _refuse_pickled(str(found), known)
    # Without its config.json nothing can be done, so that one is asked for and its error is raised.
    absent = frozenset(filter(belongs_to_base, repo.absent)) - {CONFIG_FILE}
    # A cache may lack the manifest and the card, which are not needed to read the base.
    root = repo.fetch(base_small(str(found), known) - absent - (repo.absent & {MANIFEST_FILE, CARD_FILE}))
    try:
        weights = base_weights(str(found), known, root)
    except CheckpointError as exc:
        if isinstance(opened, LocalCopy):
            exc.hint = "upload the missing files: the upload is incomplete"
        raise
    # A store's weights are read where they are, by ranges; and the Hub's where that is wanted.
    wanted = frozenset() if isinstance(repo, LocalCopy) else weights
    place = replace(_place(text, root, repo), weights=wanted, issues=_absent_issues(str(found), absent))
    return replace(place, repo=opened) if isinstance(opened, Repo) else place


def _streamable(found: Found, text: str) -> Source:
    """Return the repo of a base whose weights are read where they are, without a download.

    Raises:
        ResolveError: it is elsewhere.
    """
    if isinstance(found, Source) and found.host == "hf":
        return found
    if isinstance(found, StoreUrl):
        sentence = "is in an object store, where weights are read by ranges without --stream-base"
    elif isinstance(found, Source):
        sentence = "is on ModelScope, and --stream-base reads from the Hugging Face Hub only"
    else:
        sentence = "is a directory of this machine, and --stream-base is for a base on the Hugging Face Hub"
    raise ResolveError(f"{text}: {sentence}", hint="leave out --stream-base")


def _opened(found: Source | StoreUrl, access: Access, watch: Observer) -> Repo | LocalCopy:
    """Return a repo, or a prefix of a store, with its listing.

    Raises:
        ResolveError: it cannot be reached, or nothing is there.
    """
    if isinstance(found, Source):
        return open_repo(found, access, watch)
    if access.offline and found.scheme != "file":
        sentence = f"{found}: is in an object store, and offline mode is on"
        raise ResolveError(sentence, hint="leave out --offline, or pass a local directory")
    return local_copy(found, watch)


def _place(text: str, root: Path, held: Repo | LocalCopy) -> Place:
    if isinstance(held, LocalCopy):
        return Place(text, root, copy=held)
    return Place(text, root, held)


def _refuse_pickled(label: str, names: Collection[str]) -> None:
    """Check that a base whose weights are read by ranges has safetensors.

    Raises:
        ResolveError: it has only files of ``torch.save``, which are read as a whole.
    """
    pickled = [name for name in (PICKLED_INDEX_FILE, PICKLED_FILE) if name in names]
    if pickled and not {INDEX_FILE, SAFETENSORS_FILE} & set(names):
        sentence = (
            f"{label}: has its weights in {pickled[0]}, expected safetensors, which can be read in parts"
        )
        hint = "download it and pass its folder, or save the model with safetensors"
        raise ResolveError(sentence, hint=hint)


def locate_named_base(adapter: Place, access: Access, watch: Observer) -> Place:
    """Return where the base is that an adapter names, with its small files on this machine.

    Raises:
        ResolveError: it names none, or none that is here or on a hub.
        UnsupportedError: its name says that it is stored in a way that is not read.
    """
    found, text = _named_base(adapter)
    try:
        return locate_base(found, text, access, watch)
    except ResolveError as exc:
        hint = f"{exc.hint}; or pass the base's directory with --base DIRECTORY"
        raise ResolveError(
            f"{adapter.text}: its base model is {exc}", hint=hint.removeprefix("; or ")
        ) from exc


def _named_base(adapter: Place) -> tuple[Found, str]:
    """Return the base that an adapter names, and the name.

    Raises:
        ResolveError: it names none, or only a path that is not here.
    """
    named = named_bases(adapter)
    if not named:
        raise ResolveError(
            f"{adapter.text}: the adapter does not name its base model",
            hint="pass the base with --base DIRECTORY",
        )
    # A local directory wins over a repo, as for a name that the user gives.
    for name, _ in named:
        if is_directory(Path(name)):
            return find(name, "base"), name
    source = next((source for _, source in named if source is not None), None)
    url = next((name for name, _ in named if is_store_url(name)), None)
    if source is None and url is not None:
        # A stranger may have written it, and the store would be asked with the user's credentials.
        raise ResolveError(
            f"{adapter.text}: its base model is {url}, and a URL that only an adapter names is not read",
            hint=f"pass it with --base {url}, if you trust it",
        )
    if source is None:
        raise ResolveError(
            f"{adapter.text}: its base model is {named[0][0]}, and this directory does not exist here",
            hint="pass the base's directory with --base DIRECTORY",
        )
    _refuse_unread(source)
    return source, str(source)


def _refuse_unread(source: Source) -> None:
    unread = unread_kind(source.repo)
    if unread is not None:
        sentence = f"the base is stored as {unread[0]} (according to its name), which is not supported"
        named = replace(source, repo=unread[1], folder="", revision=None)
        hint = f"merge into its full-precision original, probably --base {named}"
        raise UnsupportedError([error("unsupported", str(source), sentence, hint)])


def _absent_issues(label: str, absent: frozenset[str]) -> tuple[Issue, ...]:
    if not absent:
        return ()
    them = "it" if len(absent) == 1 else "them"
    sentence = (
        f"the local cache does not have {listing(sorted(absent))}, so the output will not have {them} either"
    )
    return (warning("cache-incomplete", label, sentence, f"run once without --offline to download {them}"),)
