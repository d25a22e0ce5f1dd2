"""Where outputs go: the table of storages, by the scheme of the output's text.

Another kind is one module with a class, and one line in `STORAGES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.storage.hub.uploads.output import HubDestination
from lora_merge.storage.hub.uploads.push import SCHEME
from lora_merge.storage.local_output import LocalDestination
from lora_merge.storage.objects.urls import SHAPES
from lora_merge.storage.store_output import StoreDestination

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.storage.destination import Storage

STORAGES: Mapping[str, Storage] = {
    "": LocalDestination,
    **dict.fromkeys(SHAPES, StoreDestination),
    SCHEME: HubDestination,
}
"""Scheme of a URL → storage; the empty one is for plain paths."""


def storage_of(out: str) -> Storage:
    """Return the storage that an output goes to.

    Args:
        out: as the user wrote it. A text with another scheme goes to the local storage, whose `path` refuses it.
    """
    scheme, colon, _ = out.partition("://")
    return STORAGES[scheme if colon and scheme in STORAGES else ""]
