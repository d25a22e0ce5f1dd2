"""Which version of each weight file a base in a store had: an ETag or a generation, where files have no times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.storage.sources import is_local

if TYPE_CHECKING:
    from lora_merge.core.checkpoint import Checkpoint
    from lora_merge.core.identity import Inputs


def versions_of(base: Checkpoint, inputs: Inputs) -> dict[str, str]:
    """Return weight file → the version that was read, by the names in the checkpoint; nothing for local files.

    What ``file://`` calls a version has an inode and a time of this machine, which a manifest does not have. Of a base on the
    Hub, the manifest has the commit, which says it for every file.

    Args:
        base: the checkpoint.
        inputs: what was read.
    """
    if is_local(base.root) or base.root.startswith(("file://", "hf://")):
        return {}
    places = {file.name: ref.file for file in base.files for ref in file.tensors[:1]}
    read = {name: inputs.files[place].identity.tag for name, place in places.items() if place in inputs.files}
    return {name: tag for name, tag in read.items() if tag}
