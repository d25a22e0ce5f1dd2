"""The names that an adapter's files have for its base, and whether the given base has one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import ADAPTER_CONFIG, CONFIG_FILE
from lora_merge.core.report import Issue, warning
from lora_merge.errors import ResolveError
from lora_merge.formats.repo_files import TRAINING_ARGUMENTS
from lora_merge.formats.side_files import MANIFEST_FILE
from lora_merge.quantised import SETTINGS_FILES
from lora_merge.quantised.tables import settings_of
from lora_merge.storage.same_model import cached_repo, quantised_words, same_copy, same_model
from lora_merge.storage.small_files import read_json, read_text
from lora_merge.storage.source import Source, parse_source
from lora_merge.storage.user_paths import real_path, user_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_merge.planning.locate import Place
    from lora_merge.storage.source import Host


def moved_base(base: Place, adapters: Sequence[Place]) -> tuple[Issue, ...]:
    """Return a warning for each adapter that names another revision of the base's own repo."""
    known = _revision_of(base)
    if known is None:
        return ()
    repo, folder, wanted, others = known
    issues = []
    for adapter in adapters:
        for _, named in named_bases(adapter):
            if named is None or named.revision is None or named.repo != repo:
                continue
            if named.revision not in {wanted, *others}:
                sentence = (
                    f"the base is at revision {wanted}, and the adapter {adapter.text} names revision "
                    f"{named.revision}: the base may have changed since the training"
                )
                hint = f"use the revision that the adapter names: --base {replace(named, folder=folder)}"
                issues.append(warning("base-moved", base.text, sentence, hint))
            # The best name that has a revision decides.
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
        named = names_in(adapter, config)
        pairs = [(name, how, ours, _is_same(name, ours, base.root)) for name in named for ours, how in known]
        # One name that fits is enough: a base may be known by several.
        if any(same for *_, same in pairs):
            continue
        name, how, ours, _ = next((pair for pair in pairs if pair[3] is False), (None, "", "", None))
        if name is not None:
            shown = "configurations" if _is_of_another_family(folder_of(name), base.root) else "names"
            why = f"their {shown} differ, so they look like different models"
            called = f"called {base.root.name}" if ours == base.label else f"{ours}{how}"
            sentence = f"the base is {called}, and the adapter {adapter.text} was trained on {name}; {why}"
            hint = (
                f"merge into the model that the adapter was trained on: --base {name}; ignore this if both "
                "names mean one model"
            )
            issues.append(warning("other-base", base.text, sentence, hint))
    return tuple(issues)


def names_in(adapter: Place, config: Mapping[str, Any]) -> list[str]:
    """Return every name of the base in an adapter's files, the best first.

    Args:
        adapter: where it is.
        config: of it, as it was read.
    """
    named = [name for name, _ in named_bases(adapter)]
    own = config.get("base_model_name_or_path")
    return [*named, own] if isinstance(own, str) and own and own not in named else named


def is_this_model(name: str, base: Place) -> bool:
    """Return True where a name is known to mean the base's model, in whichever copy."""
    return any(_is_same(name, ours, base.root) for ours, _ in _names_of(base))


def is_this_copy(name: str, base: Place, *, quantised: bool) -> bool:
    """Return True where a name means the base as it is stored, not another copy of the same model.

    Args:
        name: in an adapter.
        base: what is merged into.
        quantised: whether the base is stored quantised.
    """
    folder = folder_of(name)
    if folder == base.root:
        return True
    if folder is not None and bool(quantisation_in(folder)) != quantised:
        return False
    # Configurations of quantised copies often keep the name of the original.
    ours = [one for one, how in _names_of(base) if not how or not quantised or quantised_words(one)]
    return any(same_copy(name, one) for one in (*ours, base.label))


def quantisation_in(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return what the small files of a model's folder say about how it is quantised; empty where they say nothing."""
    side = {name: _json(folder / name) for name in SETTINGS_FILES}
    return settings_of(_json(folder / CONFIG_FILE), side)


def _names_of(base: Place) -> list[tuple[str, str]]:
    """Return ``(name, where it is said)`` for each name that a base has."""
    # A repo's own name is the truth; all others are hints.
    if base.origin is not None:
        return [(base.origin.source.repo, "")]
    cached = cached_repo(base.label)
    if cached is not None:
        return [(cached[0], ", from its path in the cache")]
    said = _json(base.root / CONFIG_FILE).get("_name_or_path")
    made_of = _json(base.root / MANIFEST_FILE).get("base")
    merged = made_of.get("id") or made_of.get("path") if isinstance(made_of, dict) else None
    names = [
        (said, ", from its config.json"),
        (merged, ", from its merge_manifest.json"),
        (base.label, ""),
    ]
    return [(name, how) for name, how in names if isinstance(name, str) and name]


def _is_same(named: str, ours: str, root: Path) -> bool | None:
    """Return True where a name is the base's or leads to it, False for another model's, None where it does not tell."""
    folder = folder_of(named)
    if folder == root:
        return True
    return False if _is_of_another_family(folder, root) else same_model(named, ours)


def _is_of_another_family(folder: Path | None, root: Path) -> bool:
    """Return True where the configurations of two folders name two families; False where one names none."""
    families = {_family(folder) if folder is not None else None, _family(root)}
    return None not in families and len(families) == 2


def folder_of(name: str) -> Path | None:
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


def named_bases(adapter: Place) -> list[tuple[str, Source | None]]:
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


def _json(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}
