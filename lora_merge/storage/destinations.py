"""Where outputs go: one kind of storage for each scheme of the output's text.

Another kind is one module with a class, and one line in `STORAGES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.storage.local_output import LocalDestination

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.storage.destination import Storage

STORAGES: Mapping[str, Storage] = {"file": LocalDestination}
"""By the scheme of a URL, ``file`` for a path."""


def storage_of(out: str) -> Storage:
    """Return the kind of storage that an output goes to.

    Args:
        out: as the user names it. A text whose scheme nobody knows is a path: files may have any name.
    """
    scheme, colon, _ = out.partition("://")
    return STORAGES[scheme if colon and scheme in STORAGES else "file"]
