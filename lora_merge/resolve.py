"""Directories → what is there: a `Checkpoint` and an `Adapter`, from headers and small files only."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge import adapters
from lora_merge.core.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    INPUT_NAMES,
    OUTPUT_NAMES,
    PICKLED_FILE,
    PICKLED_INDEX_FILE,
    SAFETENSORS_FILE,
    Checkpoint,
    WeightFile,
)
from lora_merge.core.conversion import Conversion
from lora_merge.core.manifest import merged_before
from lora_merge.core.shards import shard_name
from lora_merge.errors import CheckpointError
from lora_merge.io.files import read_json
from lora_merge.io.recognise import broken_link, fault_of, names_in
from lora_merge.io.safetensors import same_values
from lora_merge.io.shards import read_shards, reader_of
from lora_merge.io.side_files import MANIFEST_FILE, base_side_files, differs, other_weights
from lora_merge.layouts import Stored
from lora_merge.words import choice

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from lora_merge.core.adapter import Adapter

_PICKLED = (PICKLED_FILE, PICKLED_INDEX_FILE)


def resolve_adapter(root: Path, ignored: Collection[str] = ()) -> Adapter:
    """Return the adapter in a directory, in whichever format it is.

    Args:
        root: the directory.
        ignored: files in it that the user wants left out.

    Raises:
        ResolveError: its files are broken.
        UnknownFormatError: no known format matches.
    """
    return adapters.read(root, ignored)


def resolve_base(root: Path) -> Checkpoint:
    """Return the checkpoint in a directory: ``config.json`` and weights, one file or shards.

    Safetensors win over ``.bin`` files. Files that the index does not name are not part of the model.

    Raises:
        CheckpointError: the configuration, the index or a shard is missing or broken.
    """
    if not (root / CONFIG_FILE).is_file():
        raise _no_base(root) or CheckpointError(
            str(root), "", "has no config.json", hint="--base takes the folder of a whole model"
        )
    config = read_json(root / CONFIG_FILE)
    entry = _entry(root)
    index = read_json(root / entry) if entry.endswith(".json") else None
    files = (_single_file(root, entry),) if index is None else read_shards(root, entry, index)
    _check_merged(root, config, files)
    side_files, notes = base_side_files(root)
    weights = {file.name for file in files}
    return Checkpoint(
        root=str(root),
        config=config,
        files=_output_files(files, sharded=index is not None) if entry in _PICKLED else files,
        sharded=index is not None,
        index_metadata=_table((index or {}).get("metadata")),
        side_files=tuple(file for file in side_files if file.name not in weights),
        notes=notes + _weight_notes(root, entry, files, index),
        merged=merged_before(read_json(root / MANIFEST_FILE)) if (root / MANIFEST_FILE).is_file() else (),
    )


def own_side_files(adapter: Adapter, base: Checkpoint) -> tuple[str, ...]:
    """Return the names of the adapter's tokenizer and template files that differ from the base's."""
    return tuple(file.name for file in adapter.side_files if differs(file, Path(base.root)))


def unchanged_parameters(adapter: Adapter, base: Checkpoint) -> frozenset[str]:
    """Return the whole parameters in an adapter that are but copies of the base's. Reads both.

    PEFT saves the output embedding along when it is a target, trained or not.
    """
    if adapter.config.get("layer_replication"):
        return frozenset()  # its names count other layers than the base's
    stored = Stored(base.by_name(), lambda: Conversion.of(base.config))
    return frozenset(
        parameter
        for parameter, replacement in adapter.replacements.items()
        if replacement.why != "module"
        for name in [stored.disk_name(parameter)]
        if name in stored.tensors and same_values(stored.tensors[name], replacement.ref)
    )


def equal_embeddings(base: Checkpoint, adapters: Iterable[Adapter]) -> frozenset[frozenset[str]]:
    """Return the pairs of an input and an output embedding that have equal values, by stored name. Reads them.

    PEFT saves both ends of a tie, if it saves them at all.
    """
    groups = [[ref for ref in base.tensors() if ref.name.endswith(".weight") and len(ref.shape) == 2]]
    for adapter in adapters:
        rows = [delta.tensors["rows"] for delta in adapter.deltas if delta.kind == "rows"]
        groups.append([*rows, *(replacement.ref for replacement in adapter.replacements.values())])
    found = set()
    for refs in groups:
        inputs = [ref for ref in refs if _owner(ref.name) in INPUT_NAMES]
        heads = [ref for ref in refs if _owner(ref.name) in OUTPUT_NAMES]
        for one, other in product(inputs, heads):
            if one.dtype == other.dtype and same_values(one, other):
                found.add(frozenset((one.name, other.name)))
    return frozenset(found)


def _owner(name: str) -> str:
    """Return the last part of the path of the module that owns a weight, without the wrappers of PEFT."""
    path = re.sub(r"\.(weight|base_layer|token_adapter|trainable_tokens_delta)(?=\.|$)", "", name)
    return path.rpartition(".")[2]


def _weight_notes(
    root: Path, entry: str, files: tuple[WeightFile, ...], index: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Return a sentence for each weight file that is left out, and each tensor that the index forgot."""
    known = frozenset(file.name for file in files) | {entry}
    why = "the index does not name it" if index is not None else f"{entry} is the model"
    stale = [f"{name} was left out: {why}" for name in other_weights(root, known)]
    listed = index["weight_map"] if index is not None else {ref.name for ref in files[0].tensors}
    forgotten = [
        f"{ref.name} is in {file.name} though the index does not name it; it was kept"
        for file in files
        for ref in file.tensors
        if ref.name not in listed
    ]
    return tuple(stale + forgotten)


def _entry(root: Path) -> str:
    """Return the name of the file that says what the weights are: the index, or the only one.

    Raises:
        CheckpointError: there is none.
    """
    entries = (INDEX_FILE, SAFETENSORS_FILE, PICKLED_INDEX_FILE, PICKLED_FILE)
    found = next((name for name in entries if (root / name).is_file()), None)
    if found is None:
        raise _no_base(root) or CheckpointError(
            str(root), "", "holds no weights", choice(entries), hint="fetch the weights too"
        )
    return found


def _no_base(root: Path) -> CheckpointError | None:
    """Return the error of a directory that is no base, with what it is instead; None where that cannot be told."""
    fault = fault_of(names_in(root), "base", f"{root}/")
    broken = broken_link(root)
    if broken is None and fault is not None:
        return CheckpointError(str(root), "", fault.sentence, hint=fault.hint)
    return broken


def _check_merged(root: Path, config: Mapping[str, Any], files: tuple[WeightFile, ...]) -> None:
    """Check that a base is no model that was saved with PEFT's layers still in it.

    Code of a model's own may have such layers (Phi-4-multimodal).

    Raises:
        CheckpointError: it is.
    """
    names = [ref.name for file in files for ref in file.tensors]
    wrapped = next((name for name in names if ".base_layer." in name), None)
    factor = next((name for name in names if ".lora_A." in name), None)
    if wrapped and factor and "auto_map" not in config:
        raise CheckpointError(
            str(root), wrapped, f"is a layer of PEFT, and {factor} is the LoRA on it: the model was saved unmerged",
            hint="save it again from PEFT: model.merge_and_unload() for a merged model, model.unload() for the base alone",
        )  # fmt: skip


def _single_file(root: Path, name: str) -> WeightFile:
    return reader_of(name)(root / name, name)


def _output_files(files: tuple[WeightFile, ...], *, sharded: bool) -> tuple[WeightFile, ...]:
    """Return ``.bin`` files under the names that transformers gives such a checkpoint in safetensors."""
    return tuple(
        replace(file, name=shard_name(n, len(files)) if sharded else SAFETENSORS_FILE)
        for n, file in enumerate(files, 1)
    )


def _table(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
