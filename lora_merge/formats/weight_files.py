"""Weights in one file or in shards, with an index or without, in safetensors or from ``torch.save``."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.formats.recognise import broken_link
from lora_merge.formats.safetensors import read_header
from lora_merge.storage.at_once import in_turn, of_each
from lora_merge.storage.small_files import read_json
from lora_merge.storage.sources import is_stored
from lora_merge.storage.user_paths import is_file
from lora_merge.words import listing, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from typing import Any

    from lora_merge.core.checkpoint import WeightFile
    from lora_merge.core.tensor import TensorRef

_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""Suffixes of weight files. Another name could collide with a file around the weights."""

_PICKLED = (".bin", ".bin.index.json", ".pt", ".pth")

MAX_SHARDS = 100_000
"""The most shards that a shard's name may claim."""

_SHARD = re.compile(r"(?P<stem>adapter_model)-(?P<n>\d+)-of-(?P<of>\d+)(?P<suffix>\.safetensors|\.bin)")


def reader_of(name: str) -> Callable[[str | Path, str], WeightFile]:
    """Return the function that reads a weight file's index, by the file's name or that of its index file."""
    if not name.endswith(_PICKLED):
        return read_header
    from lora_merge.formats.pickles import read_pickle  # most runs need no zip files and no pickles

    return read_pickle


def adapter_entries(names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the forms in which a folder holds an adapter's tensors: entry → its files, in order of preference.

    An entry is the only file, the index of shards, or of shards without an index the first. In the order in which
    they are preferred: PEFT takes safetensors first.

    Example:
        >>> adapter_entries({"adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"})
        {'adapter_model.safetensors': ('adapter_model.safetensors',), 'adapter_model.bin': ('adapter_model.bin',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for suffix in (".safetensors", ".bin"):
        single, index = f"adapter_model{suffix}", f"adapter_model{suffix}.index.json"
        shards = sorted(
            name
            for name in names
            for match in [_SHARD.fullmatch(name)]
            if match and match["suffix"] == suffix
        )
        if single in names:
            found[single] = (single,)
        if index in names:
            found[index] = tuple(shards)
        elif shards:
            found[shards[0]] = tuple(shards)
    return found


def read_adapter(root: Path, entry: str) -> tuple[tuple[TensorRef, ...], tuple[Path, ...]]:
    """Return the tensors of an adapter, and the files that hold them.

    Args:
        root: its folder.
        entry: a key of `adapter_entries`.

    Raises:
        CheckpointError: a file is broken, or a shard is missing.
    """
    if entry.endswith(".index.json"):
        files = read_shards(root, entry, read_json(root / entry))
        named = tuple(file.name for file in files)
    else:
        named = _unindexed(root, entry)
        files = tuple(reader_of(name)(root / name, name) for name in named)
        _check_unique(root, files)
    refs = tuple(ref for file in files for ref in file.tensors)
    return refs, tuple(root / name for name in named)


def _unindexed(root: Path, entry: str) -> tuple[str, ...]:
    """Return all shards of the set that a shard's name belongs to; any other file alone.

    Raises:
        CheckpointError: a shard is missing.
    """
    match = _SHARD.fullmatch(entry)
    if match is None:
        return (entry,)
    n_shards = int(match["of"])
    if n_shards > MAX_SHARDS:
        raise CheckpointError(
            str(root), entry, f"has file names that count {n_shards} shards", f"at most {MAX_SHARDS}"
        )
    wanted = tuple(
        f"{match['stem']}-{n:0{len(match['n'])}}-of-{match['of']}{match['suffix']}"
        for n in range(1, n_shards + 1)
    )
    # All that are missing are named at once.
    missing = [name for name in wanted if not is_file(root / name)]
    if missing:
        raise CheckpointError(
            str(root),
            "",
            f"does not have {listing(missing)}",
            f"all {n_shards} shards that the file names count",
            hint="download the missing files: the download is incomplete",
        )
    return wanted


def place_of(root: Path, weights: str, name: str) -> str:
    """Return the text that names a weight file.

    Args:
        root: the directory of the model.
        weights: where its weight files are, if elsewhere (``scheme://…/folder``).
        name: the file's, relative.
    """
    return f"{weights}/{name}" if weights else str(root / name)


def _is_there(root: Path, weights: str, name: str) -> bool:
    return is_stored(place_of(root, weights, name)) if weights else is_file(root / name)


def read_shards(
    root: Path, entry: str, index: Mapping[str, Any], weights: str = ""
) -> tuple[WeightFile, ...]:
    """Return the index of every file that an index names. Each must hold exactly the tensors that the index says.

    Args:
        root: the directory of the model.
        entry: the name of the index.
        index: what it says.
        weights: as for `place_of`.

    Raises:
        CheckpointError: a shard is missing, is outside the directory, or disagrees with the index.
    """
    label = str(root / entry)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(label, "weight_map", f"is {quoted(weight_map)}", "a table of tensor → file")
    # Each file is checked once, not once for each of its tensors.
    first = {str(file): (name, file) for name, file in weight_map.items()}  # one tensor of each file
    names = sorted(_file_name(label, name, file) for name, file in first.values())
    each = of_each if weights else in_turn
    is_there = each(lambda name: _is_there(root, weights, name), names)
    missing = [name for name, found in zip(names, is_there, strict=True) if not found]
    if missing:
        raise broken_link(root) or CheckpointError(
            str(root),
            "",
            f"does not have {listing(missing)}",
            f"the {len(names)} files that its index names",
            hint="download the missing files: the download is incomplete",
        )
    read = reader_of(entry)
    files = tuple(each(lambda name: read(place_of(root, weights, name), name), names))
    found = {ref.name: file.name for file in files for ref in file.tensors}
    for name, file in weight_map.items():
        # Loaders that go by the index would take the tensor from another file, or not find it.
        if found.get(name) != file:
            got = f"is in {found[name]}" if name in found else "is in no file"
            raise CheckpointError(label, name, got, f"it in {file}, as the index says")
    _check_unique(root, files)
    return files


def _check_unique(root: Path, files: tuple[WeightFile, ...]) -> None:
    """Check that no two files hold a tensor of the same name.

    Raises:
        CheckpointError: two do.
    """
    names = Counter(ref.name for file in files for ref in file.tensors)
    for twice, count in names.most_common(1):
        if count > 1:
            raise CheckpointError(str(root), twice, "is stored in two files", "it in one")


def _file_name(label: str, tensor: str, file: object) -> str:
    """Return a shard's name, which must stay inside the directory.

    Raises:
        CheckpointError: it is not a name, or leads elsewhere.
    """
    if not isinstance(file, str) or not file:
        raise CheckpointError(label, tensor, f"is mapped to {quoted(file)}", "a file name")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\\" in file or "\0" in file:
        raise CheckpointError(label, tensor, f"is mapped to {file}", "a file inside the model's directory")
    # The output has shards of the base's names: ``README.md`` would collide with the card.
    if path.suffix not in _SUFFIXES:
        raise CheckpointError(
            label, tensor, f"is mapped to {file}", f"a name that ends in {' or '.join(_SUFFIXES)}"
        )
    return file
