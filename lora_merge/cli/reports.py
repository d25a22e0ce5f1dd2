"""The page of ``--report``: what the command was, and a line that says where the page is."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lora_merge.cli import exits
from lora_merge.cli.options import given_values
from lora_merge.cli.voice import say
from lora_merge.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.reporting.page_file import PageFile
    from lora_merge.reporting.subject import Subject


@contextlib.contextmanager
def page_file(path: str | None, subject: Subject, *, quiet: bool) -> Iterator[PageFile]:
    """Yield the file that takes the result of a command. It is written at the end, also where the run failed.

    Args:
        path: of the page; None for none.
        subject: what the command was asked to do; its command line is added. The page may not be in one of its outputs.
        quiet: do not say where the page is.

    Raises:
        RequestError: a page cannot be there.
        SystemExit: the page cannot be written, and the run itself met no error.
    """
    from lora_merge.reporting.page_file import PageFile

    if path is not None:
        from lora_merge.reporting.command import command_text

        subject = replace(subject, command=command_text(subject.verb, given_values()))
    file = PageFile(path, subject)
    try:
        with file:
            yield file
    except WriteError as exc:
        if exc is not file.failure:
            raise
        # The result is printed already, and stays the only document on stdout.
        _say_failure(exc)
        sys.exit(exits.WRITE)
    except (click.exceptions.Exit, SystemExit) as exc:
        if file.failure is None:
            raise
        _say_failure(file.failure)
        code = exc.exit_code if isinstance(exc, click.exceptions.Exit) else exc.code
        sys.exit(code or exits.WRITE)
    finally:
        if file.is_written and not quiet:
            say(f"report: {path}")


def _say_failure(failure: WriteError) -> None:
    say(f"error: {failure}")
    say(f"hint: {failure.hint}")
