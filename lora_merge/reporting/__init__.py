"""Reports as pages: a result of any verb → one self-contained HTML file, for people who were not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

    from lora_merge.errors import LoraMergeError
    from lora_merge.reporting.page_file import Result


def report_html(result: Result | LoraMergeError) -> str:
    """Return a result as an HTML page: of `merge`, `verify` or `inspect`, of a batch, or of an error that one of them raised."""
    from lora_merge.reporting.page_file import page_of
    from lora_merge.reporting.rendering import rendered
    from lora_merge.reporting.subject import Subject

    return rendered(page_of(result, Subject("merge")))


def write_report(result: Result | LoraMergeError, path: str | PathLike[str]) -> None:
    """Write a result as an HTML page, or replace the page.

    Args:
        result: of `merge`, `verify` or `inspect`, of a batch, or an error that one of them raised.
        path: an ``.html`` file.

    Raises:
        RequestError: a page cannot be there.
        WriteError: it cannot be written.
    """
    from os import fspath

    from lora_merge.reporting.page_file import checked_place, page_of, write_page
    from lora_merge.reporting.subject import Subject

    write_page(checked_place(fspath(path)), page_of(result, Subject("merge")))
