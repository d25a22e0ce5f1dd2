"""Outputs of a batch in object stores: one that is complete is kept, and not compared with its inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.batches.up_to_date import Standing
from lora_merge.core.report import note
from lora_merge.merging.preparing import MARKS
from lora_merge.storage.destination import Wish
from lora_merge.storage.destinations import storage_of

if TYPE_CHECKING:
    from lora_merge.requests.request import Request


def standing_in_store(request: Request) -> Standing | None:
    """Return whether an output in a store is there, with a note where it is complete and stays; None for one on a disk.

    Raises:
        LoraMergeError: the store cannot be asked.
    """
    storage = storage_of(request.out)
    if not storage.takes_files:
        return None
    out = storage.path(request.out)
    wish = Wish(out, resume=True, overwrite=False, marks=MARKS, inputs=())
    if request.overwrite or not storage.is_complete(wish):
        return Standing(is_there=False)
    sentence = (
        "is complete and was kept; in a store it is not compared with its inputs (--overwrite makes it again)"
    )
    return Standing(is_there=True, notes=(note("not-compared", out, sentence),))
