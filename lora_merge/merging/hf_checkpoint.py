"""The files that make a directory of weights a Hugging Face checkpoint: index, config, side files, card and manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE, patched_config
from lora_merge.formats.model_card import card_text
from lora_merge.formats.provenance import Provenance, delta_table, manifest_text
from lora_merge.formats.side_files import CARD_FILE, MANIFEST_FILE
from lora_merge.storage.digests import file_digest, text_digest
from lora_merge.storage.small_files import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.checkpoint import SideFile
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.tensor import TensorRecord

MARKS = (CONFIG_FILE, MANIFEST_FILE)
"""File names; a directory with one of them is a model checkpoint. The manifest shows it also where the config was
lost.
"""


class Folder(Protocol):
    """Where small files go: a `lora_merge.storage.destination.Destination`, or a directory."""

    def write_text(self, name: str, text: str) -> None:
        """Write a new file, in UTF-8."""

    def copy_in(self, source: str, name: str) -> str:
        """Copy the file that a text names under another name; return the digest of the bytes that were read."""


def seal(
    folder: Folder, plan: MergePlan, records: Sequence[TensorRecord], provenance: Provenance
) -> dict[str, str]:
    """Write the files around the weights: index, config, side files, card and manifest.

    Returns:
        The digest of each file, taken of what it is made from: a text, or the file that is copied. Whether the disk
        holds that is for verification to say.

    Raises:
        CheckpointError: a side file cannot be read.
        WriteError: the disk is full or cannot be written.
    """
    digests: dict[str, str] = {}

    def write(name: str, text: str) -> None:
        folder.write_text(name, text)
        digests[name] = text_digest(text)

    for side_file in plan.side_files:
        text = _patched(plan, side_file)
        if text is not None:
            write(side_file.name, text)
        else:
            digests[side_file.name] = folder.copy_in(side_file.source, side_file.name)
    if plan.index:
        write(INDEX_FILE, plan.index)
    # The manifest lists the digests of all files above, but not of the card, which is written after it is
    # made.
    manifest = manifest_text(provenance, plan, records, digests)
    write(CARD_FILE, card_text(provenance, plan, _deltas(plan, records)))
    write(MANIFEST_FILE, manifest)
    return digests


def _deltas(plan: MergePlan, records: Sequence[TensorRecord]) -> dict[str, dict[str, float]]:
    """Return what the manifest says of deltas, by the tensor that each is in."""
    survivals = {record.name: record.survival for record in records}
    return {
        slot.name: delta_table(step, survival)
        for step in plan.steps
        for slot in step.slots
        if (survival := survivals[slot.name]) is not None
    }


def side_digest(plan: MergePlan, side_file: SideFile) -> str:
    """Return the digest that a side file has in the output: of its patched text, or of the file that is copied.

    Raises:
        CheckpointError: its source cannot be read.
    """
    text = _patched(plan, side_file)
    return file_digest(side_file.source) if text is None else text_digest(text)


def _patched(plan: MergePlan, side_file: SideFile) -> str | None:
    """Return the text of the configuration with the plan's patch; None for a file that is copied as it is.

    Raises:
        CheckpointError: its source cannot be read.
    """
    patch = plan.config_patch
    if not patch.changes(side_file.name):
        return None
    if side_file.name != CONFIG_FILE:
        return json.dumps(patch.files[side_file.name], indent=2, ensure_ascii=False) + "\n"
    config = patched_config(read_json(side_file.source), patch)
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"
