"""Outputs of a batch in object stores: one that is complete is compared by its manifest, and kept where it is up to date."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_merge.batches.up_to_date import Standing
from lora_merge.core.report import note
from lora_merge.merging.made_already import other_than
from lora_merge.merging.output_place import place_of_job, wish_of

if TYPE_CHECKING:
    from lora_merge.planning.run import Planned
    from lora_merge.requests.request import Request
    from lora_merge.storage.destination import Storage, Wish


def standing_in_store(planned: Planned) -> Standing | None:
    """Return whether an output in a store is there, and whether it is up to date; None for one on a disk.

    Its weights are not read: a note says so where it is kept.

    Raises:
        LoraMergeError: the store cannot be asked.
    """
    storage, wish = place_of_output(planned.request)
    if not storage.takes_files:
        return None
    if not storage.is_complete(wish):
        return Standing(is_there=False)
    fault = other_than(planned, storage.published(wish))
    sentence = "were not read; the output is up to date by its manifest"
    notes = () if fault else (note("not-read", "weights in the store", sentence),)
    return Standing(is_there=True, fault=fault, notes=notes)


def place_of_output(request: Request) -> tuple[Storage, Wish]:
    """Return the storage of an output, and what a batch wants to know of its place.

    Raises:
        ResolveError: the text cannot be a path or a URL.
    """
    out, storage = place_of_job(request)
    return storage, replace(wish_of(request, out), resume=True, overwrite=False)
