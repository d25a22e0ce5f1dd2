"""Reads a written checkpoint as it is, sound or not: no content of it makes this raise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE, WeightFile
from lora_merge.core.report import Issue
from lora_merge.core.weight import Weight
from lora_merge.errors import CheckpointError
from lora_merge.formats.model_config import read_config
from lora_merge.formats.safetensors import read_header
from lora_merge.formats.side_files import is_inside
from lora_merge.formats.stored_weights import settings_files, weights_in
from lora_merge.formats.weight_files import place_of
from lora_merge.quantised import Found
from lora_merge.quantised.tables import settings_of
from lora_merge.storage.at_once import in_turn, of_each
from lora_merge.storage.local import why_no_file
from lora_merge.storage.small_files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from lora_merge.core.tensor import TensorRef

_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Output:
    """A model's directory as an engine finds it: what can be read, and what is wrong with the rest."""

    root: str

    names: frozenset[str]
    """Every file, relative to the root."""

    config: Mapping[str, Any] | None
    """``config.json``; None when it is missing or broken."""

    index: Mapping[str, Any] | None
    """``model.safetensors.index.json``; None when it is missing or broken."""

    files: Mapping[str, WeightFile]
    """The safetensors files at the top, and those that the index names."""

    broken: Mapping[str, str]
    """File → why it cannot be read: one of `files`, or something that is not a regular file (a pipe, a device)."""

    outside: Mapping[str, str] = field(default_factory=dict)
    """Those of `files` that are links out of the directory → where they lead."""

    quantised: Mapping[str, Weight] = field(default_factory=dict)
    """Parameters that are stored quantised, by name."""

    faults: tuple[Issue, ...] = ()
    """What is wrong with how they are stored."""

    elsewhere: str = ""
    """Where the weight files are, if not in `root` (``scheme://…/folder``)."""

    def file_of(self, name: str) -> str:
        """Return the text that names a weight file."""
        return place_of(Path(self.root), self.elsewhere, name)

    def tensors(self) -> dict[str, TensorRef]:
        """Return every tensor by its name. The references have full paths as `TensorRef.file`."""
        return {ref.name: ref for file in self.files.values() for ref in file.tensors}

    def weights(self) -> dict[str, Weight]:
        """Return every parameter by its name; a tensor that is not part of a quantised one counts as one."""
        parts = {ref.name for weight in self.quantised.values() for ref in weight.parts.values()}
        plain = {name: Weight.dense(ref) for name, ref in self.tensors().items() if name not in parts}
        return {**plain, **self.quantised}


def read_output(root: Path, weights: str = "", stored: Collection[str] = ()) -> Output:
    """Return what is in a directory, by its headers and small files. What cannot be read is reported in
    `Output.broken`.

    Args:
        root: the directory; of an output in another storage, one that has its small files.
        weights: where its weight files are, if not in ``root`` (``scheme://…/folder``).
        stored: the names of the files that are there.
    """
    found_names, broken, outside = _names(root)
    names = frozenset({*found_names, *stored})

    def attempt(name: str, read: Callable[[Path], Any]) -> Any:
        return None if name not in names else reported(name, lambda: read(root / name))

    def reported(name: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except CheckpointError as exc:
            broken[name] = str(exc).removeprefix(f"{exc.file}: ")
            return None

    def header(name: str) -> Any:
        return reported(name, lambda: read_header(place_of(root, weights if name in stored else "", name)))

    config, index = attempt(CONFIG_FILE, read_config), attempt(INDEX_FILE, read_json)
    # At the top only: weights in folders belong to something else, unless the index names them.
    wanted = {name for name in names if name.endswith(_WEIGHTS) and "/" not in name}
    # An index may name files elsewhere, or that are not there: only those that exist are read.
    wanted |= {str(file) for file in weight_map(index).values()} & names
    each = of_each if weights else in_turn
    headers = dict(zip(sorted(wanted), each(header, sorted(wanted)), strict=True))
    files: dict[str, WeightFile] = {name: file for name, file in headers.items() if file is not None}
    try:
        found = _quantised(root, config or {}, files)
    except CheckpointError as exc:
        broken[Path(exc.file).name] = str(exc)
        found = Found({})
    quantised = {name: weight for name, weight in found.weights.items() if weight.plain is None}
    return Output(str(root), names, config, index, files, broken, outside, quantised, found.issues, weights)


def _quantised(root: Path, config: Mapping[str, Any], files: Mapping[str, WeightFile]) -> Found:
    """Return the weights of a checkpoint that says of some that they are quantised; nothing of another.

    Raises:
        CheckpointError: a file of settings, or a small tensor, cannot be read.
    """
    if not settings_of(config, settings_files(root)):
        return Found({})
    # The names of the files are below the root, and the references have full paths already.
    return weights_in(root, config, files.values())


def weight_map(index: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the table tensor → file of an index; empty where it has none."""
    found = (index or {}).get("weight_map")
    return found if isinstance(found, dict) else {}


def _names(root: Path) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Return three things: relative names of all files below a directory; entries that are not regular files, each
    with the reason; links that lead out of it, each with its target.
    """
    names: list[str] = []
    broken: dict[str, str] = {}
    outside: dict[str, str] = {}
    for directory, _, found in os.walk(root):
        for name in found:
            path = Path(directory, name)
            relative = path.relative_to(root).as_posix()
            why = why_no_file(path)
            if why:
                broken[relative] = why
                continue
            names.append(relative)
            # Weight files may be links to anywhere. Another file behind a link would be missing from a copy
            # of the directory.
            if path.is_symlink() and not relative.endswith(_WEIGHTS) and not is_inside(path, root):
                outside[relative] = str(path.resolve())
    return names, broken, outside
