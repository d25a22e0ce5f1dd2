"""Adapter formats: a directory → `Adapter`. One reader per format; `FORMATS` is the table of them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.adapters.mlx import read_mlx
from lora_merge.adapters.peft import read_peft
from lora_merge.adapters.swift import read_swift
from lora_merge.adapters.unread import sharded_error, unread_issues
from lora_merge.core.adapter import Adapter
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.core.report import note
from lora_merge.errors import ResolveError, UnknownFormatError
from lora_merge.formats.recognise import broken_link, fault_of, in_order, names_in
from lora_merge.formats.repo_files import ADAPTER_PICKLE, ADAPTER_WEIGHTS, EXTRA_FOLDER, MLX_WEIGHTS
from lora_merge.formats.sentence_modules import module_files, whole_model
from lora_merge.formats.side_files import adapter_side_files
from lora_merge.formats.trainer_files import file_names
from lora_merge.words import listing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Format:
    """One way to keep an adapter in a directory."""

    read: Callable[[Path, Collection[str]], Adapter | None]
    """Directory, files that the user leaves out → the adapter; None where the directory is not of this format."""

    weights: str
    """The file of tensors that it looks for, beside its configuration."""

    looked_for: str
    """Its files, as an error names them."""


FORMATS: Mapping[str, Format] = {
    "peft": Format(
        read_peft, ADAPTER_WEIGHTS, f"{ADAPTER_CONFIG} with {ADAPTER_WEIGHTS} or {ADAPTER_PICKLE} (PEFT)"
    ),
    "ms-swift": Format(
        read_swift, ADAPTER_WEIGHTS, f"one whose {ADAPTER_CONFIG} has a swift_type (ms-swift)"
    ),
    "mlx": Format(read_mlx, MLX_WEIGHTS, f"{ADAPTER_CONFIG} with {MLX_WEIGHTS} (mlx-lm)"),
}
"""In the order in which they are asked. Each tells its own configuration from the others', so that one answers."""

__all__ = ["FORMATS", "Format", "read"]


def read(root: Path, ignored: Collection[str] = ()) -> Adapter:
    """Return the adapter in a directory, or in the only subfolder of it that holds one.

    PEFT and ms-swift save a named adapter into a subfolder of that name. Files beside it that may hold
    weights and that nothing reads are errors in the adapter's issues.

    Args:
        root: the directory.
        ignored: files in it that the user wants left out.

    Raises:
        UnknownFormatError: no format matches.
        ResolveError: its files are broken, or several subfolders hold an adapter.
    """
    adapter = _read_directory(root, ignored)
    if adapter is not None:
        return adapter
    # PEFT and ms-swift save a named adapter into a subfolder of that name.
    inside = sorted(
        (path for path in root.iterdir() if path.name != EXTRA_FOLDER and (path / ADAPTER_CONFIG).is_file()),
        key=lambda path: in_order(path.name),
    )
    # A configuration in the folder itself means that this is the adapter, and that it is incomplete.
    if not inside or (root / ADAPTER_CONFIG).is_file():
        raise _deeper(root) or sharded_error(root, file_names(root)) or _unknown(root)
    if len(inside) > 1:
        names = listing([path.name for path in inside], 8)
        sentence = f"{root}: contains {len(inside)} adapters ({names}), expected one"
        raise ResolveError(sentence, hint=f"pass the folder of one of them: {_likely(inside)}")
    (only,) = inside
    own_ignored = {name.removeprefix(f"{only.name}/") for name in ignored if name.startswith(f"{only.name}/")}
    adapter = _read_directory(only, own_ignored)
    if adapter is None:
        raise sharded_error(only, file_names(only)) or _unknown(only)
    found = note(
        "subfolder",
        str(root),
        f"has no adapter at its top level; the one in its subfolder {only.name} was used",
    )
    # The modules around a transformer that has its own folder would not find it in the output.
    apart = module_files(root) if whole_model(only) else ()
    around = [file for file in adapter_side_files(root) if file.name not in apart]
    # The adapter's own files win over those around it.
    own = {file.name: file for file in (*around, *adapter.side_files)}
    side_files = tuple(own[name] for name in sorted(own))
    own_names = {path.name for path in root.iterdir() if path.is_file()}
    outside = unread_issues(replace(adapter, root=str(root)), own_names, own_names.intersection(ignored))
    return replace(adapter, issues=(found, *adapter.issues, *outside), side_files=side_files)


def _deeper(root: Path) -> ResolveError | None:
    """Return the error of a folder whose adapters are two levels down: all runs of a trainer, or a step of verl."""
    if (root / ADAPTER_CONFIG).is_file():
        return None
    found = sorted(root.glob(f"*/*/{ADAPTER_CONFIG}"), key=lambda path: in_order(str(path)))
    inside = [path.parent for path in found if not path.is_relative_to(root / EXTRA_FOLDER)]
    if not inside:
        return None
    names = listing([path.relative_to(root).as_posix() for path in inside], 8)
    return ResolveError(
        f"{root}: has no adapter at its top level; deeper folders have {names}",
        hint=f"pass the folder of one of them: {_likely(inside)}",
    )


def _likely(adapters: Sequence[Path]) -> Path:
    """Return the one of several adapters that a hint names: of numbered ones (``checkpoint-500``) the last."""
    return adapters[-1 if all(path.name[-1].isdecimal() for path in adapters) else 0]


def _unknown(root: Path) -> ResolveError:
    """Return the error of a directory that is not an adapter, and what it is instead if that is known."""
    broken = broken_link(root)
    if broken is not None:
        return broken
    names = names_in(root)
    what, hint = fault_of(names, "adapter") or ("", "")
    top = [name for name in names if "/" not in name]
    return UnknownFormatError(
        str(root), top or names, tuple(one.looked_for for one in FORMATS.values()), what, hint
    )


def _read_directory(root: Path, ignored: Collection[str]) -> Adapter | None:
    """Return the adapter in a directory itself, by the first format that recognises it, or None."""
    for one in FORMATS.values():
        adapter = one.read(root, ignored)
        if adapter is None:
            continue
        issues = unread_issues(adapter, file_names(root), ignored) if adapter.files else []
        return replace(adapter, issues=(*adapter.issues, *issues)) if issues else adapter
    return None
