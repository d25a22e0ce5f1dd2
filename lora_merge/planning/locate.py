"""Texts → local directories: a directory of that name, or what is fetched of a repo, small files first."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.adapters import FORMATS
from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.core.report import Issue, error, note, warning
from lora_merge.errors import RequestError, ResolveError, UnsupportedError
from lora_merge.formats.repo_files import (
    EXTRA_FOLDER,
    TRAINING_ARGUMENTS,
    adapter_copies,
    adapter_small,
    adapter_weights,
    base_small,
    base_weights,
)
from lora_merge.formats.side_files import MANIFEST_FILE, belongs_to_adapter, belongs_to_base
from lora_merge.formats.trainer_files import chosen, described, file_names, unread_files
from lora_merge.storage.hub import Access, Repo, open_repo
from lora_merge.storage.paths import file_hint, missing_hint
from lora_merge.storage.same_model import cached_repo, same_model
from lora_merge.storage.small_files import read_json, read_text
from lora_merge.storage.source import Source, parse_source, unread_kind
from lora_merge.storage.user_paths import is_directory, real_path, user_path
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.core.report import Observer
    from lora_merge.storage.source import Host, Origin

Found = Path | Source


@dataclass(frozen=True, slots=True)
class Place:
    """Where a base or an adapter is."""

    text: str
    """As the user or the adapter named it."""

    root: Path
    """The local directory; of a repo, only the small files are in it at first."""

    repo: Repo | None = None
    """None for a local directory."""

    weights: frozenset[str] = frozenset()
    """Files of the repo that are still to be fetched."""

    issues: tuple[Issue, ...] = ()

    ignored: frozenset[str] = frozenset()
    """Files of an adapter that the user wants left out."""

    @property
    def origin(self) -> Origin | None:
        """The source and its commit; None for a local directory."""
        return self.repo.origin if self.repo else None

    def whole(self) -> Path:
        """Return the directory with the weights in it, which are fetched now.

        Raises:
            ResolveError: they cannot be fetched.
        """
        return self.repo.fetch(self.weights) if self.repo else self.root


def find(text: str, role: str) -> Found:
    """Return the directory of this name, or the source that the text means; a directory always wins.

    Raises:
        ResolveError: it is neither, or a directory that cannot be read.
        UnsupportedError: it is a base whose name says that it is stored in a way that is not read.

    Args:
        text: as the user or an adapter has it.
        role: ``"base"`` or ``"adapter"``, for messages.
    """
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
        raise ResolveError(f"{text}: is a file, expected the {role}'s directory", hint=file_hint(root))
    raise ResolveError(f"{text}: there is no such directory", hint=missing_hint(text, role))


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
            f"{base} is an adapter, and {adapter} is a model: --base and --adapter are swapped",
            hint=f"write --base {adapter} --adapter {base}",
        )


def locate_adapter(
    found: Found, text: str, access: Access, watch: Observer, ignore: Sequence[str] = ()
) -> Place:
    """Return where an adapter is, with its configuration and side files in reach.

    Args:
        found: its directory, or its repo.
        text: as the user named it.
        access: how a hub may be asked.
        watch: hears of downloads.
        ignore: names of files in it that the user wants left out.

    Raises:
        ResolveError: the repo cannot be reached, or holds no adapter.
    """
    if isinstance(found, Path):
        return Place(text, found, ignored=chosen(file_names(found), ignore) if ignore else frozenset())
    repo = open_repo(found, access, watch)
    # Adapters in subfolders, for a message: a repo may hold one per checkpoint.
    elsewhere = repo.folders_with(ADAPTER_CONFIG) if not found.folder else ()
    known = repo.names | repo.absent
    ignored = chosen(known, ignore)
    formats = {one.weights for one in FORMATS.values()}
    small = adapter_small(str(found), known, elsewhere, formats)
    absent = frozenset(filter(belongs_to_adapter, repo.absent))
    # What is in the small files is checked before any weights are fetched.
    root = repo.fetch(small - absent)
    weights = adapter_weights(known, formats, ignored) | repo.beside(EXTRA_FOLDER)
    copies = adapter_copies(known, ignored)
    # The listing suffices: a file that no reader would read is refused before it is fetched.
    unread = [
        error("unread-file", name, *described(name))
        for name in unread_files(known, weights | copies, ignored)
    ]
    sentence = "holds the adapter again, and was not fetched: PEFT does not read it either"
    notes = [note("adapter-copy", name, sentence) for name in sorted(copies)]
    return Place(text, root, repo, weights, (*_absent_issues(str(found), absent), *unread, *notes), ignored)


def check_ignored(places: Sequence[Place], ignore: Sequence[str]) -> None:
    """Check that each file that is to be ignored is there.

    Raises:
        RequestError: one is in none of the adapters.
    """
    found = frozenset().union(*(place.ignored for place in places))
    for name in ignore:
        if not chosen(found, [name]):
            sentence = f"{name} is no file of {' or of '.join(place.text for place in places)}"
            raise RequestError("", 0, "ignore_file", sentence, hint="leave the option out, or check the name")


def locate_base(found: Found, text: str, access: Access, watch: Observer) -> Place:
    """Return where a base is, with its configuration, side files and index on this machine.

    Raises:
        ResolveError: the repo cannot be reached, or holds no model.
    """
    if isinstance(found, Path):
        return Place(text, found)
    repo = open_repo(found, access, watch)
    known = repo.names | repo.absent
    # Without its config.json nothing can be done, so that one is asked for and its error is raised.
    absent = frozenset(filter(belongs_to_base, repo.absent)) - {CONFIG_FILE}
    root = repo.fetch(base_small(str(found), known) - absent - (repo.absent & {MANIFEST_FILE}))
    weights = base_weights(str(found), known, root)
    return Place(text, root, repo, weights, _absent_issues(str(found), absent))


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
        hint = f"{exc.hint}; or say where it is with --base DIRECTORY"
        raise ResolveError(
            f"{adapter.text}: its base model is {exc}", hint=hint.removeprefix("; or ")
        ) from exc


def _named_base(adapter: Place) -> tuple[Found, str]:
    """Return the base that an adapter names, and the name.

    Raises:
        ResolveError: it names none, or only a path that is not here.
    """
    named = _named_bases(adapter)
    if not named:
        raise ResolveError(f"{adapter.text}: names no base model", hint="say which with --base DIRECTORY")
    # A local directory wins over a repo, as for a name that the user gives.
    for name, _ in named:
        if is_directory(Path(name)):
            return find(name, "base"), name
    source = next((source for _, source in named if source is not None), None)
    if source is None:
        raise ResolveError(
            f"{adapter.text}: its base model is {named[0][0]}, and there is no such directory here",
            hint="say where it is with --base DIRECTORY",
        )
    _refuse_unread(source)
    return source, str(source)


def moved_base(base: Place, adapters: Sequence[Place]) -> tuple[Issue, ...]:
    """Return a warning for each adapter that names another revision of the base's own repo."""
    known = _revision_of(base)
    if known is None:
        return ()
    repo, folder, wanted, others = known
    issues = []
    for adapter in adapters:
        for _, named in _named_bases(adapter):
            if named is None or named.revision is None or named.repo != repo:
                continue
            if named.revision not in {wanted, *others}:
                sentence = (
                    f"revision {wanted} is what the adapter is merged into, and "
                    f"{adapter.text} names revision {named.revision}: the base may have moved since"
                )
                hint = f"--base {replace(named, folder=folder)} is what it names"
                issues.append(warning("base-moved", base.text, sentence, hint))
            break
    return tuple(issues)


def _revision_of(base: Place) -> tuple[str, str, str, frozenset[str]] | None:
    """Return repo, folder and revision of a base, and other names of the revision; None where that is not known."""
    origin = base.origin
    if origin is not None:
        return origin.source.repo, origin.source.folder, origin.source.wanted, frozenset({origin.commit})
    cached = cached_repo(str(base.root))
    if cached is None or not cached[1]:
        return None
    # A directory in the Hub's cache has its commit in its path, and files with the commits of branches and tags
    # beside it.
    repo, commit = cached
    references = next(path for path in base.root.parents if path.name == "snapshots").with_name("refs")
    names = {
        path.relative_to(references).as_posix()
        for path in (references.rglob("*") if references.is_dir() else ())
        if path.is_file() and read_text(path).strip() == commit
    }
    return repo, "", commit, frozenset(names)


def other_base(
    base: Place, adapters: Sequence[Place], configs: Sequence[Mapping[str, Any]]
) -> tuple[Issue, ...]:
    """Return a warning for each adapter that names another model than the base, as far as names tell.

    Args:
        base: what is merged into.
        adapters: what is merged.
        configs: of the adapters, as they were read.
    """
    known = _names_of(base)
    issues = []
    for adapter, config in zip(adapters, configs, strict=True):
        named = [name for name, _ in _named_bases(adapter)]
        own = config.get("base_model_name_or_path")
        named += [own] if isinstance(own, str) and own and own not in named else []
        pairs = [(name, how, ours, _is_same(name, ours, base.root)) for name in named for ours, how in known]
        # One name that fits is enough: a base may be known by several.
        if any(same for *_, same in pairs):
            continue
        name, how, ours, _ = next((pair for pair in pairs if pair[3] is False), (None, "", "", None))
        if name is not None:
            shown = "configurations" if _is_of_another_family(_folder(name), base.root) else "names"
            why = f"by their {shown} these are two models"
            called = f"called {base.root.name}" if ours == str(base.root) else f"{ours}{how}"
            sentence = f"is {called}, and the adapter {adapter.text} was trained on {name}: {why}"
            hint = f"merge into what it was trained on: --base {name}; if the two are one model, all is well"
            issues.append(warning("other-base", base.text, sentence, hint))
    return tuple(issues)


def _names_of(base: Place) -> list[tuple[str, str]]:
    """Return ``(name, where it is said)`` for each name that a base has."""
    # A repo's own name is the truth; all others are hints.
    if base.origin is not None:
        return [(base.origin.source.repo, "")]
    cached = cached_repo(str(base.root))
    if cached is not None:
        return [(cached[0], ", by its place in the cache")]
    said = _json(base.root / CONFIG_FILE).get("_name_or_path")
    made_of = _json(base.root / MANIFEST_FILE).get("base")
    merged = made_of.get("id") or made_of.get("path") if isinstance(made_of, dict) else None
    names = [(said, ", by its config.json"), (merged, ", by its merge_manifest.json"), (str(base.root), "")]
    return [(name, how) for name, how in names if isinstance(name, str) and name]


def _is_same(named: str, ours: str, root: Path) -> bool | None:
    """Return True where a name is the base's or leads to it, False for another model's, None where it does not tell."""
    folder = _folder(named)
    if folder == root:
        return True
    return False if _is_of_another_family(folder, root) else same_model(named, ours)


def _is_of_another_family(folder: Path | None, root: Path) -> bool:
    """Return True where the configurations of two folders name two families; False where one names none."""
    families = {_family(folder) if folder is not None else None, _family(root)}
    return None not in families and len(families) == 2


def _folder(name: str) -> Path | None:
    """Return the model's folder that a name leads to on this machine; None where it leads to none."""
    try:
        folder = real_path(user_path(name))
        return folder if (folder / CONFIG_FILE).is_file() else None
    except (ResolveError, OSError):
        return None


def _family(root: Path) -> str | None:
    """Return the ``model_type`` in a folder's ``config.json``; None where it has none."""
    family = _json(root / CONFIG_FILE).get("model_type")
    return family if isinstance(family, str) else None


def _named_bases(adapter: Place) -> list[tuple[str, Source | None]]:
    """Return the names of the base in an adapter's files, the best first, and the repo that each means on a hub."""
    config, arguments = (_json(adapter.root / name) for name in (ADAPTER_CONFIG, TRAINING_ARGUMENTS))
    # ms-swift leaves a path of the machine that it ran on in PEFT's file, and the repo in its own.
    model, own = arguments.get("model"), config.get("base_model_name_or_path") or config.get("model")
    host: Host = adapter.origin.source.host if adapter.origin else "hf"
    # ms-swift's own word on the hub that it took the model from; without it, the adapter's hub.
    trained_on: Host = host if "use_hf" not in arguments else ("hf" if arguments["use_hf"] else "ms")
    model_revision = arguments.get("model_revision")
    revision = config.get("revision") or (model_revision if own == model else None)
    candidates = [(own, revision, trained_on if own == model else host), (model, model_revision, trained_on)]
    return [
        (name, _source(name, revision, host))
        for name, revision, host in candidates
        if isinstance(name, str) and name
    ]


def _source(name: str, revision: object, host: Host) -> Source | None:
    """Return the repo that an adapter names; None for what can only be a path."""
    # A repo is ``owner/name``.
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return None
    source = parse_source(f"{host}://{name}")
    if source is None:
        return None
    return replace(source, revision=str(revision) if revision else source.revision, explicit=False)


def _refuse_unread(source: Source) -> None:
    unread = unread_kind(source.repo)
    if unread is not None:
        sentence = f"the base is stored quantised as {unread[0]}, as its name says, which is not supported"
        named = replace(source, repo=unread[1], folder="", revision=None)
        hint = f"merge into its full-precision parent, probably --base {named}"
        raise UnsupportedError([error("unsupported", str(source), sentence, hint)])


def _absent_issues(label: str, absent: frozenset[str]) -> tuple[Issue, ...]:
    if not absent:
        return ()
    sentence = f"lacks {listing(sorted(absent))} in the local cache, and so will the output"
    return (warning("cache-incomplete", label, sentence, "run once without --offline"),)


def _json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}
