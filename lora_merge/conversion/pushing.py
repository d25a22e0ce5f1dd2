"""Adapters that go to the Hub: made in a directory, which is temporary where none is to stay, and pushed from there."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_merge.conversion.job import MARKS
from lora_merge.merging.pushing import placed, push_of
from lora_merge.runtime.temporary import temporary_folder
from lora_merge.storage.hub.uploads.folder import check_target, push_folder
from lora_merge.storage.hub.uploads.push import is_on_hub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.conversion.lora import ConvertReport
    from lora_merge.core.report import Observer
    from lora_merge.requests.request import ConvertRequest, ExtractRequest
    from lora_merge.storage.hub.uploads.push import Push

AdapterRequest = TypeVar("AdapterRequest", "ConvertRequest", "ExtractRequest")


@contextlib.contextmanager
def on_this_disk(request: AdapterRequest, message: str) -> Iterator[tuple[AdapterRequest, Push | None]]:
    """Yield a request that writes to a directory, and the push that follows; None where there is none.

    Args:
        request: may have no directory, or the text of a repo in its place.
        message: of the commit, where the request has none.

    Raises:
        LoraMergeError: the request says no repo that can be written to, or the Hub cannot be asked.
    """
    request = placed(request)
    push = push_of(request, message)
    if push is None:
        yield request, None
        return
    check_target(push, MARKS, "", overwrite=request.overwrite)
    if request.out and not is_on_hub(request.out):
        yield request, push
        return
    with temporary_folder() as folder:
        # The name is seen in the adapter's card.
        yield replace(request, out=str(folder / push.repo.rpartition("/")[2])), push


def pushed(
    report: ConvertReport, request: AdapterRequest, asked: AdapterRequest, push: Push | None, watch: Observer
) -> ConvertReport:
    """Push an adapter that is written, where that was asked for; return the report with where people see it.

    Args:
        report: on the adapter.
        request: with its directory.
        asked: as the user made it.
        push: where to.
        watch: hears of it.

    Raises:
        LoraMergeError: the Hub refuses something. A directory that was asked for stays.
    """
    if push is None:
        return report
    address = push_folder(Path(report.out), push, MARKS, watch, overwrite=request.overwrite)
    is_kept = bool(asked.out) and not is_on_hub(asked.out)
    return replace(report, pushed=address, out=report.out if is_kept else str(push))
