"""The files beside the weights of an output, and what the base has that is not in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.core.report import Issue, note, warning
from lora_merge.modeling.plain_config import fetched_part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.adapter import AdapterUse
    from lora_merge.core.checkpoint import Checkpoint, SideFile


def side_files_of(base: Checkpoint, uses: Sequence[AdapterUse]) -> tuple[tuple[SideFile, ...], list[Issue]]:
    """Return the side files of the output, sorted by name, and a note on each that an adapter brings."""
    # The base's, unless an adapter has one that differs; of several adapters the last one's.
    files = {file.name: file for file in base.side_files}
    issues: list[Issue] = []
    taken: set[str] = set()
    for use in uses:
        # What an earlier adapter brought stays.
        for name in use.displaced & files.keys() - taken:
            del files[name]
        for file in use.adapter.side_files:
            if file.name not in use.own_side_files:
                continue
            if file.name in taken:
                sentence = "several adapters have this file; the output gets the last adapter's copy"
                issues.append(warning("side-file", file.name, sentence))
            else:
                copy = " instead of the base's, which differs" if file.name in files else ""
                sentence = f"the output gets the adapter's copy{copy}"
                issues.append(note("side-file", file.name, sentence))
            taken.add(file.name)
            files[file.name] = file
    return tuple(sorted(files.values(), key=lambda file: file.name)), issues


def left_out(base: Checkpoint) -> list[Issue]:
    """Return a note on each file of the base that was left out, and on a part that the config only names."""
    notes = [note("left-out", "", sentence) for sentence in base.notes]
    part = fetched_part(base.config)
    if part is not None:
        sentence = (
            f"{part}; it is not downloaded, so modules of it that the adapter targets without having tensors "
            "for them are not detected"
        )
        notes.append(note("not-fetched", CONFIG_FILE, sentence))
    return notes
