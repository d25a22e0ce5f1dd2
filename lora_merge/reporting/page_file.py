"""The file of a page: its place is checked before a run begins, and it is written when the run has ended, however it ended."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Self, TypeAlias, TypeVar

from lora_merge.errors import LoraMergeError, RequestError, WriteError
from lora_merge.storage.objects.urls import is_like_url, is_store_url, path_here
from lora_merge.storage.user_paths import output_path, real_path, user_path
from lora_merge.storage.whole_file import write_whole

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from lora_merge.batches.reports import BatchReport
    from lora_merge.core.report import Proof, Report
    from lora_merge.inspection.facts import Inspection
    from lora_merge.reporting.page import Page
    from lora_merge.reporting.subject import Subject

Result: TypeAlias = "Report | Proof | Inspection | BatchReport"
Shown = TypeVar("Shown", bound="Result")

SUFFIXES = (".html", ".htm")


def page_of(result: Result | LoraMergeError, subject: Subject, *, failed: bool | None = None) -> Page:
    """Return the page of a result, or of an error.

    Args:
        result: of any verb.
        subject: what was asked for.
        failed: whether a verification counts as failed; default: whether a check failed.
    """
    # A run without a page pays for none of this.
    from lora_merge.batches.reports import BatchReport
    from lora_merge.core.report import Proof, Report
    from lora_merge.inspection.facts import Inspection

    command = subject.command
    match result:
        case Report():
            from lora_merge.reporting.merges import merge_page

            return merge_page(result, command)
        case Proof():
            from lora_merge.reporting.proofs import proof_page

            return proof_page(result, command, failed=not result.ok if failed is None else failed)
        case Inspection():
            from lora_merge.reporting.inspections import inspection_page

            return inspection_page(result, command)
        case BatchReport():
            from lora_merge.reporting.batches import batch_page

            return batch_page(result, command)
        case LoraMergeError():
            from lora_merge.reporting.failures import failure_page

            return failure_page(result, subject)


class PageFile:
    """Writes the page of one run, when the block that it guards ends: of the result that was shown, or of the error.

    Args:
        path: of the page, as the user named it; None for none.
        subject: what the run was asked to do.
    """

    def __init__(self, path: str | None, subject: Subject) -> None:
        self._subject = subject
        self._result: Result | None = None
        self._failed: bool | None = None
        self.place: Path | None = None if path is None else checked_place(path, subject.outs)
        """Where the page goes; None for nowhere."""

        self.is_written = False
        self.failure: WriteError | None = None
        """Why the page could not be written; None if it was, or has not been tried."""

    def show(self, result: Shown, *, failed: bool | None = None) -> Shown:
        """Take the result that the page is to show, and return it."""
        self._result, self._failed = result, failed
        return result

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the page.

        Raises:
            WriteError: it cannot be written, and the run itself met no error.
        """
        failed = error if isinstance(error, LoraMergeError) else None
        shown = self._result if self._result is not None else failed
        if self.place is None or shown is None:
            return
        try:
            write_page(self.place, page_of(shown, self._subject, failed=self._failed))
            self.is_written = True
        except WriteError as exc:
            self.failure = exc
            if error is None:
                raise
            # The error of the run itself is what the user has to hear of first.
            error.add_note(f"{exc}; {exc.hint}")


def write_page(place: Path, page: Page) -> None:
    """Write a page, or replace it.

    Raises:
        WriteError: it cannot be written.
    """
    from lora_merge.reporting.rendering import rendered

    text = rendered(page)
    try:
        write_whole(place, text)
    except OSError as exc:
        sentence = f"the report {place} cannot be written ({exc.strerror or exc})"
        raise WriteError(sentence, hint="choose another --report") from exc


def checked_place(path: str, outs: tuple[str, ...] = ()) -> Path:
    """Return the place of a page, links followed, if a page can be written there.

    Args:
        path: as the user named it.
        outs: directories of outputs, which hold nothing but what a merge writes.

    Raises:
        RequestError: it cannot.
    """
    if is_like_url(path):
        hint = "name a file of this machine, such as report.html, and copy it afterwards"
        raise _refusal(f"{path} is a URL, and a report is written to a disk only", hint)
    try:
        given = user_path(path)
        place = real_path(given)
        homes = [home for out in outs if out and (home := _home(out)) is not None]
    except LoraMergeError as exc:
        raise _refusal(str(exc), exc.hint) from exc
    for home in homes:
        if place == home or home in place.parents:
            sentence = f"{path} is inside the output {home}, which holds the checkpoint alone"
            raise _refusal(sentence, "choose a place outside of it")
    if place.is_dir():
        raise _refusal(f"{path} is a directory, expected a file", "name a file in it, such as report.html")
    if given.suffix.lower() not in SUFFIXES:
        what = f"is a {given.suffix} file" if given.suffix else "has no suffix"
        raise _refusal(f"{path} {what}, expected .html", "the report is an HTML page: name it report.html")
    if place.exists() and not place.is_file():
        raise _refusal(f"{path} is not a regular file", "name a new file, such as report.html")
    if not place.parent.is_dir():
        raise _refusal(f"{path}: there is no directory {place.parent}", "create it, or choose another place")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise _refusal(f"{path}: you may not write in {place.parent}", "choose another place")
    return place


def _home(out: str) -> Path | None:
    """Return the directory of an output; None for one in a store."""
    here = path_here(out) if is_store_url(out) else user_path(out)
    return None if here is None else output_path(str(here))


def _refusal(sentence: str, hint: str) -> RequestError:
    return RequestError("", 0, "report", sentence, hint=hint)
