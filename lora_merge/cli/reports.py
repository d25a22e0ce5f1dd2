"""The page of ``--report``: what the command was, and a line that says where the page is."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli import exits
from lora_merge.cli.voice import say
from lora_merge.errors import WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.reporting.page_file import PageFile
    from lora_merge.requests.option import Verb


@contextlib.contextmanager
def page_file(
    verb: Verb,
    path: str | None,
    *,
    base: str | None = None,
    adapters: tuple[str, ...] = (),
    outs: tuple[str, ...] = (),
    quiet: bool = False,
) -> Iterator[PageFile]:
    """Yield the file that takes the result of a command. It is written at the end, also where the run failed.

    Args:
        verb: the command.
        path: of the page; None for none.
        base: as the user named it.
        adapters: likewise.
        outs: directories of outputs; the page may not be in one.
        quiet: do not say where the page is.

    Raises:
        RequestError: a page cannot be there.
        SystemExit: the page cannot be written, and the run itself met no error.
    """
    from lora_merge.reporting.page_file import PageFile
    from lora_merge.reporting.subject import Subject

    command = "" if path is None else _command(verb, click.get_current_context())
    file = PageFile(path, Subject(verb, command, base or "", adapters, outs))
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


def _command(verb: Verb, context: click.Context) -> str:
    """Return the command line, of the options that were given."""
    from lora_merge.reporting.command import command_text

    given = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
    values: dict[str, Any] = {
        name: value for name, value in context.params.items() if context.get_parameter_source(name) in given
    }
    return command_text(verb, values)
