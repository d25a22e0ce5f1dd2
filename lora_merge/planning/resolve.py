"""Directories → what is there: a `Checkpoint` and an `Adapter`, from headers and small files only."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_merge import adapters
from lora_merge.core.adapter import Delta
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
    owner_name,
)
from lora_merge.core.report import Issue, warning
from lora_merge.core.shards import shard_name
from lora_merge.core.tensor import TORCH_NAMES
from lora_merge.errors import CheckpointError
from lora_merge.formats.manifest import merged_before
from lora_merge.formats.model_config import read_config
from lora_merge.formats.recognise import broken_link, fault_of, names_in
from lora_merge.formats.safetensors import differing_rows, is_zero, same_values
from lora_merge.formats.sentence_modules import MODULES_FILE, absent_modules, module_folders, whole_model
from lora_merge.formats.side_files import MANIFEST_FILE, base_side_files, differs, other_weights
from lora_merge.formats.stored_weights import weights_in
from lora_merge.formats.weight_files import place_of, read_shards, reader_of
from lora_merge.layouts import Stored
from lora_merge.modeling.conversion import Conversion
from lora_merge.modeling.counts import excess_of
from lora_merge.modeling.skeleton import build_skeleton
from lora_merge.storage.local_copies import local_path
from lora_merge.storage.shown import by_url
from lora_merge.storage.small_files import read_json
from lora_merge.storage.sources import is_stored
from lora_merge.words import choice

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from lora_merge.core.adapter import Adapter, StackedPair
    from lora_merge.core.weight import Weight

_PICKLED = (PICKLED_FILE, PICKLED_INDEX_FILE)


def resolve_adapter(root: Path, ignored: Collection[str] = ()) -> Adapter:
    """Return the adapter in a directory, in any of the known formats.

    Args:
        root: the directory.
        ignored: files in it that the user wants left out.

    Raises:
        ResolveError: its files are broken.
        UnknownFormatError: no known format matches.
    """
    return adapters.read(root, ignored)


def resolve_base(root: Path, weights: str = "") -> Checkpoint:
    """Return the checkpoint in a directory: ``config.json`` and weights, in one file or in shards.

    Safetensors win over ``.bin`` files. Files that the index does not name are not part of the model.

    Args:
        root: the directory: its small files are read there.
        weights: what the texts of its weight files begin with, if they are in another storage (`storage.sources`).

    Raises:
        CheckpointError: the configuration, the index or a shard is missing or broken.
    """
    if not (root / CONFIG_FILE).is_file():
        raise _no_base(root) or CheckpointError(
            str(root), "", "has no config.json", hint="pass the folder of a whole model with --base"
        )
    config = read_config(root / CONFIG_FILE)
    # Before anything is built of the configuration.
    _check_counts(root, config)
    entry = _entry(root, weights)
    index = read_json(root / entry) if entry.endswith(".json") else None
    if index is None:
        files: tuple[WeightFile, ...] = (reader_of(entry)(place_of(root, weights, entry), entry),)
    else:
        files = read_shards(root, entry, index, weights)
    _check_merged(root, config, files)
    side_files, notes = base_side_files(root)
    names = {file.name for file in files}
    # Which tensors make up a parameter; the rest is copied as it is.
    found = weights_in(root, config, files)
    return Checkpoint(
        root=by_url(str(root)),
        config=config,
        files=_output_files(files, sharded=index is not None) if entry in _PICKLED else files,
        sharded=index is not None,
        index_metadata=_table((index or {}).get("metadata")),
        side_files=by_url(tuple(file for file in side_files if file.name not in names)),
        weights=found.weights,
        others=found.others,
        notes=by_url(notes + _weight_notes(root, entry, files, index)),
        quantisation=found.settings,
        issues=by_url(found.issues),
        merged=merged_before(read_json(root / MANIFEST_FILE)) if (root / MANIFEST_FILE).is_file() else (),
    )


def _check_counts(root: Path, config: Mapping[str, Any]) -> None:
    """Check that a configuration counts no more layers or experts than any model has.

    Raises:
        CheckpointError: it counts more.
    """
    excess = excess_of(config)
    if excess is not None:
        # Python refuses to print a number of thousands of digits.
        value = str(excess.value) if excess.value < 1 << 64 else "a number beyond 64 bits"
        hint = "download or copy config.json again: this one does not belong to a model"
        got = f"is {value}"
        raise CheckpointError(str(root / CONFIG_FILE), excess.field, got, f"at most {excess.most}", hint=hint)


def own_side_files(adapter: Adapter, base: Checkpoint) -> tuple[str, ...]:
    """Return the names of the adapter's tokenizer and template files that differ from the base's."""
    return tuple(file.name for file in adapter.side_files if differs(file, local_path(base.root)))


def displaced_side_files(adapter: Adapter, base: Checkpoint) -> tuple[frozenset[str], tuple[Issue, ...]]:
    """Return the names of the base's side files that an adapter's modules replace, and warnings for missing ones.

    An adapter that sentence-transformers saved says which modules follow the transformer, and has those that were
    trained. Where it has a folder, nothing of the base's is left in it; a folder that it names and lacks is the base's.
    """
    sources = {file.name: local_path(file.source) for file in adapter.side_files}
    if MODULES_FILE not in sources:
        return frozenset(), _one_of_several(adapter)
    root, names = sources[MODULES_FILE].parent, sources.keys()
    named = module_folders(root)
    own = {folder for folder in named if any(name.startswith(f"{folder}/") for name in names)}
    theirs = {folder for folder in named | module_folders(local_path(base.root)) if folder not in named - own}
    displaced = {
        file.name for file in base.side_files if any(file.name.startswith(f"{one}/") for one in theirs)
    }
    left = {file.name for file in base.side_files} - displaced
    found = own | {folder for folder in named if any(name.startswith(f"{folder}/") for name in left)}
    sentence = "names this module, and neither the adapter nor the base has its folder"
    hint = (
        "save the adapter again, as a whole; sentence-transformers cannot load the output without this folder"
    )
    return frozenset(displaced - names), tuple(
        warning("missing-module", f"{MODULES_FILE}: {folder}", sentence, hint)
        for folder in absent_modules(root, frozenset(found))
    )


def _one_of_several(adapter: Adapter) -> tuple[Issue, ...]:
    """Return a warning for an adapter in the folder of one module of a sentence-transformers model."""
    root = local_path(adapter.root)
    whole = whole_model(root)
    if whole is None:
        return ()
    sentence = (
        f"is one module of the sentence-transformers model in {whole}; the output does not contain the other "
        "modules"
    )
    hint = f"copy {whole}, and replace {root.name}/ in the copy with the output"
    return (warning("one-module", adapter.root, sentence, hint),)


def unchanged_parameters(adapter: Adapter, base: Checkpoint) -> frozenset[str]:
    """Return the whole parameters in an adapter that are only copies of the base's. Reads both.

    PEFT saves the output embedding along when it is a target, trained or not; of a tie the base has but one end.
    """
    if adapter.config.get("layer_replication"):
        return frozenset()  # its names count other layers than the base's
    stored = stored_in(base)
    return frozenset(
        parameter
        for parameter, replacement in adapter.replacements.items()
        # What is in modules_to_save was trained, even if its values did not change.
        if replacement.why != "module"
        for ref in [counterpart(parameter, stored, base)]
        if ref is not None and ref.plain is not None and same_values(ref.plain, replacement.ref)
    )


def differing_copies(adapter: Adapter, base: Checkpoint) -> dict[str, int]:
    """Return copy of an embedding in an adapter → number of rows that differ from the base's. Reads both.

    Only rows that both have are compared: a vocabulary may have been resized.
    """
    stored = stored_in(base)
    found = {}
    for parameter, one in adapter.replacements.items():
        copy = one.original or (one.ref if one.why in {"embedding", ""} else None)
        weight = counterpart(parameter, stored, base) if copy is not None else None
        ref = weight.plain if weight is not None else None
        if copy is None or ref is None or copy.shape[1:] != ref.shape[1:]:
            continue
        if {copy.dtype, ref.dtype} <= TORCH_NAMES.keys() and (n_rows := differing_rows(ref, copy)):
            found[parameter] = n_rows
    return found


def stored_in(base: Checkpoint) -> Stored:
    """Return a checkpoint's tensors as layouts take them."""
    return Stored(base.parameters(), lambda: Conversion.of(base.config))


def counterpart(parameter: str, stored: Stored, base: Checkpoint) -> Weight | None:
    """Return the base's own weight of a parameter; of an unstored end of a tie, that of the other end; else None."""
    name = stored.disk_name(parameter)
    # transformers is asked about ties of embeddings only: it takes seconds.
    if name in stored.tensors or owner_name(parameter) not in INPUT_NAMES | OUTPUT_NAMES:
        return stored.tensors.get(name)
    known = build_skeleton(base.config)
    ends = known.ends() if known is not None else {}
    other = ends.get(parameter) or ends.get(f"{stored.module(parameter.rpartition('.')[0])}.weight")
    return stored.tensors.get(stored.disk_name(other)) if other else None


def is_idle(adapter: Adapter, unchanged: frozenset[str]) -> bool:
    """Return True when every delta of an adapter is zero: it was never trained, or its scale is 0.

    Reads factors until one pair is found that is not zero: usually the first. What PEFT's own layers merge is not
    judged here.

    Args:
        adapter: as it was read.
        unchanged: the whole parameters in it that equal the base's.
    """
    pairs: list[Delta | StackedPair] = [*adapter.deltas, *adapter.stacked]
    if adapter.peft_layers or adapter.replacements.keys() - unchanged or not pairs:
        return False
    return all(_is_zero(pair) for pair in pairs)


def _is_zero(pair: Delta | StackedPair) -> bool:
    """Return True when a change is known to be zero: one of its factors is, or its scale."""
    if isinstance(pair, Delta):
        telling = [ref for role, ref in pair.factors.items() if role in pair.facts.vanishes_with]
        is_scaled_away = bool(pair.facts.vanishes_with) and not pair.scale
    else:
        # The scale of such a pair is known only when its parameter is.
        telling, is_scaled_away = list(pair.tensors.values()), False
    return is_scaled_away or any(ref.dtype in TORCH_NAMES and is_zero(ref) for ref in telling)


def equal_embeddings(base: Checkpoint, adapters: Iterable[Adapter]) -> frozenset[frozenset[str]]:
    """Return pairs of names of embeddings with equal values, in the base or in one adapter. Reads them.

    PEFT saves both ends of a tie, if it saves them at all.
    """
    plain = [weight.plain for weight in base.weights.values()]
    groups = [[ref for ref in plain if ref and ref.name.endswith(".weight") and len(ref.shape) == 2]]
    for adapter in adapters:
        rows = [delta.factors["rows"] for delta in adapter.deltas if delta.facts.replaces_rows]
        wholes = [ref for one in adapter.replacements.values() for ref in (one.ref, one.original) if ref]
        groups.append([*rows, *wholes])
    found = set()
    for refs in groups:
        ends = [ref for ref in refs if _owner(ref.name) in INPUT_NAMES | OUTPUT_NAMES]
        # PEFT saves both ends of a tie, if it saves them at all.
        for one, other in combinations(ends, 2):
            # Where dtypes differ, the second is rounded to the first's, so both orders are asked.
            if same_values(one, other) or (one.dtype != other.dtype and same_values(other, one)):
                found.add(frozenset((one.name, other.name)))
    return frozenset(found)


def _owner(name: str) -> str:
    """Return the last part of a weight's module path, without PEFT's wrappers."""
    path = re.sub(
        r"\.(weight|base_layer|original_module|modules_to_save|token_adapter|trainable_tokens_delta)(?=\.|$)",
        "",
        name,
    )
    return path.rpartition(".")[2]


def _weight_notes(
    root: Path, entry: str, files: tuple[WeightFile, ...], index: Mapping[str, Any] | None
) -> tuple[str, ...]:
    """Return a sentence for each weight file that is left out, and for each tensor that the index does not name."""
    known = frozenset(file.name for file in files) | {entry}
    why = "the index does not name it" if index is not None else f"the model is in {entry}"
    stale = [f"{name} was left out: {why}" for name in other_weights(root, known)]
    listed = index["weight_map"] if index is not None else {ref.name for ref in files[0].tensors}
    forgotten = [
        f"{ref.name} is in {file.name} and not in the index; it was kept"
        for file in files
        for ref in file.tensors
        if ref.name not in listed
    ]
    return tuple(stale + forgotten)


def _entry(root: Path, weights: str = "") -> str:
    """Return the name of the file that lists the weights: the index, or the only weight file.

    Raises:
        CheckpointError: there is none.
    """
    # Safetensors win over pickles, as in transformers.
    entries = (INDEX_FILE, SAFETENSORS_FILE, PICKLED_INDEX_FILE, PICKLED_FILE)
    found = next((name for name in entries if (root / name).is_file()), None)
    if found is None and weights:
        found = next((name for name in entries if is_stored(place_of(root, weights, name))), None)
    if found is None:
        raise _no_base(root) or CheckpointError(
            str(root), "", "contains no weights", choice(entries), hint="download the weights too"
        )
    return found


def _no_base(root: Path) -> CheckpointError | None:
    """Return the error of a directory that is not a base, with what it is instead; None where that is not known."""
    fault = fault_of(names_in(root), "base", f"{root}/")
    broken = broken_link(root)
    if broken is None and fault is not None:
        return CheckpointError(str(root), "", fault.sentence, hint=fault.hint)
    return broken


def _check_merged(root: Path, config: Mapping[str, Any], files: tuple[WeightFile, ...]) -> None:
    """Raise for a base that was saved with PEFT's layers still in it.

    Raises:
        CheckpointError: it has such layers.
    """
    names = [ref.name for file in files for ref in file.tensors]
    wrapped = next((name for name in names if ".base_layer." in name), None)
    factor = next((name for name in names if ".lora_A." in name), None)
    # Code of a model's own may have such layers (Phi-4-multimodal).
    if wrapped and factor and "auto_map" not in config:
        raise CheckpointError(
            str(root),
            wrapped,
            f"is a layer of PEFT with the LoRA {factor} on it: the model was saved without merging",
            hint=(
                "save it again from PEFT: use model.merge_and_unload() for a merged model, model.unload() "
                "for the base without LoRA"
            ),
        )


def _output_files(files: tuple[WeightFile, ...], *, sharded: bool) -> tuple[WeightFile, ...]:
    """Return ``.bin`` files under the names of such a checkpoint in safetensors."""
    return tuple(
        replace(file, name=shard_name(n, len(files)) if sharded else SAFETENSORS_FILE)
        for n, file in enumerate(files, 1)
    )


def _table(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
