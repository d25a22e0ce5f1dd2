"""Which files of a repo a merge needs, by its listing: first the small ones, then the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import (
    ADAPTER_CONFIG,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLED_FILE,
    PICKLED_INDEX_FILE,
    SAFETENSORS_FILE,
)
from lora_merge.errors import CheckpointError, ResolveError
from lora_merge.formats.recognise import fault_of
from lora_merge.formats.side_files import CARD_FILE, MANIFEST_FILE, belongs_to_adapter, belongs_to_base
from lora_merge.formats.trainer_files import LOAD_AFTER, sharded_state, trained_beside
from lora_merge.formats.weight_files import adapter_entries
from lora_merge.storage.small_files import read_json
from lora_merge.words import choice, listing

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

TRAINING_ARGUMENTS = "args.json"
"""ms-swift's own arguments; they name the base."""

TRAINER_CONFIG = "additional_config.json"
"""ms-swift's own fields of a LoRA configuration."""

ADAPTER_WEIGHTS, ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
MLX_WEIGHTS = "adapters.safetensors"

CONVERSION_MANIFEST = "conversion.json"
"""Written by our conversion: what the adapter was made from, and how."""

_ADAPTER_SMALL = frozenset(
    {ADAPTER_CONFIG, TRAINING_ARGUMENTS, TRAINER_CONFIG, CONVERSION_MANIFEST, CARD_FILE}
)
VISION_WEIGHTS = "vit.safetensors"
"""A vision tower that ms-swift trained as a whole."""

EXTRA_FOLDER = "extra_states"
"""Folder of other parameters that ms-swift trained as a whole; beside the adapter's folder, if it has one."""


def base_small(label: str, names: Collection[str]) -> frozenset[str]:
    """Return the configuration, the side files and the index of a base: what is fetched first.

    Raises:
        ResolveError: the listing is not that of a model that can be merged into.
    """
    # Refused by the listing, before anything is downloaded.
    if CONFIG_FILE not in names:
        what = fault_of(names, "base", f"{label}/")
        raise ResolveError(
            f"{label}: {what.sentence}" if what else f"{label}: has no config.json",
            hint=what.hint if what else "pass a whole model with --base",
        )
    index = next(
        (name for name in (INDEX_FILE, SAFETENSORS_FILE, PICKLED_INDEX_FILE, PICKLED_FILE) if name in names),
        None,
    )
    if index is None:
        what = fault_of(names, "base", f"{label}/")
        hint = what.hint if what else "pass the repo with the model's safetensors"
        found = sorted(name for name in names if not belongs_to_base(name))
        there = f" (it has {listing(found)})" if found else ""
        raise ResolveError(
            f"{label}: has no weights that can be merged into{there}, expected {SAFETENSORS_FILE} or {INDEX_FILE}",
            hint=hint,
        )
    small = frozenset(name for name in names if belongs_to_base(name) or name in {MANIFEST_FILE, CARD_FILE})
    # An index is small and names the weight files; a single weight file is fetched later.
    return small | {index} if index in {INDEX_FILE, PICKLED_INDEX_FILE} else small


def base_weights(label: str, names: Collection[str], root: Path) -> frozenset[str]:
    """Return the weight files of a base, whose small files are in ``root`` by now.

    Raises:
        CheckpointError: the index names a file that is not in the listing.
    """
    for index, single in ((INDEX_FILE, SAFETENSORS_FILE), (PICKLED_INDEX_FILE, PICKLED_FILE)):
        if index in names:
            return _shards(label, index, names, root)
        if single in names:
            return frozenset({single})
    return frozenset()


def _shards(label: str, index: str, names: Collection[str], root: Path) -> frozenset[str]:
    weight_map = read_json(root / index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    # Entries of other types are found when the index itself is read (`weight_files.read_shards`).
    wanted = frozenset(file for file in files if isinstance(file, str))
    missing = sorted(wanted - frozenset(names))
    if missing:
        raise CheckpointError(
            label,
            "",
            f"does not have {listing(missing)}",
            f"the {len(wanted)} files that {index} names",
            hint="choose another repo, or ask its owner: it is incomplete",
        )
    return wanted


def adapter_small(
    label: str,
    names: Collection[str],
    elsewhere: Collection[str],
    formats: Collection[str],
    example: str = "org/name/FOLDER",
) -> frozenset[str]:
    """Return the configuration and the side files of an adapter: what is fetched first.

    Args:
        label: what to call it.
        names: the files of its folder.
        elsewhere: the folders of the repo that hold an adapter.
        formats: names of the files of tensors that the formats of adapters look for.
        example: how one of its folders is named.

    Raises:
        ResolveError: the listing is not that of an adapter.
    """
    if ADAPTER_CONFIG not in names:
        what = None if elsewhere else fault_of(names, "adapter")
        if what is not None:
            raise ResolveError(f"{label}: {what.sentence}", hint=what.hint)
        hint = ""
        if elsewhere:
            hint = f"pass one of its folders with an adapter, as {example}: {listing(sorted(elsewhere), 8)}"
        raise ResolveError(f"{label}: has no {ADAPTER_CONFIG}", hint=hint)
    if not adapter_weights(names, formats):
        state = sharded_state(names)
        if state is not None:
            sentence = f"{label}: has no adapter file, only a sharded training state of {state.trainer}"
            raise ResolveError(sentence, hint=f"download it; {state.tool}; then {LOAD_AFTER}")
        what = fault_of(names, "adapter")
        wanted = choice((ADAPTER_WEIGHTS, ADAPTER_PICKLE))
        sentence = what.sentence if what else f"has no adapter weights, expected {wanted}"
        raise ResolveError(f"{label}: {sentence}", hint=what.hint if what else "")
    return frozenset(name for name in names if name in _ADAPTER_SMALL or belongs_to_adapter(name))


def adapter_weights(
    names: Collection[str], formats: Collection[str], ignored: Collection[str] = ()
) -> frozenset[str]:
    """Return the weight files of an adapter: its own in the preferred form, and those trained beside it.

    Args:
        names: the files of its folder.
        formats: names of the files of tensors that the formats of adapters look for; PEFT's are preferred.
        ignored: those that the user wants left out.
    """
    kept = frozenset(names) - frozenset(ignored)
    entries = adapter_entries(kept)
    entry = next(iter(entries), None)
    weights = kept.intersection(formats) if entry is None else {entry, *entries[entry]}
    if not weights:
        return frozenset()
    # ms-swift's files beside the adapter hold parameters that were trained as a whole.
    beside = {name for name in kept if name.startswith(f"{EXTRA_FOLDER}/") or name == VISION_WEIGHTS}
    return frozenset(weights | beside | set(trained_beside(kept)))


def adapter_copies(names: Collection[str], ignored: Collection[str] = ()) -> frozenset[str]:
    """Return the files that hold an adapter once more, in a form that is not preferred. They are not downloaded."""
    entries = adapter_entries(frozenset(names) - frozenset(ignored))
    return frozenset(name for entry in list(entries)[1:] for name in (entry, *entries[entry]))
