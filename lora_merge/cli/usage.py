"""Errors of the command line, and the answer to each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.cli.advice import Advice


class UnknownCommandError(click.UsageError):
    """The first word is not a command."""


class StrayTextError(click.UsageError):
    """Texts without an option, where the command takes none.

    Args:
        texts: the texts.
        ctx: of the command.
    """

    def __init__(self, texts: Sequence[str], ctx: click.Context) -> None:
        self.texts = tuple(texts)
        super().__init__(f"unexpected argument {' '.join(texts)}", ctx)


class MissingOptionError(click.UsageError):
    """A required option is neither on the command line nor in a ``--config`` file.

    Args:
        name: the option's field.
    """

    def __init__(self, name: str, ctx: click.Context | None = None) -> None:
        self.name = name
        super().__init__(f"missing option `--{name}`; a --config file can give it, too", ctx)


def advice_about(
    error: click.UsageError, arguments: Sequence[str], known: Mapping[str, click.Command]
) -> Advice | None:
    """Return what to say about an error of the command line; None where click's own sentence says it all.

    Args:
        error: as it was raised.
        arguments: the command line, without ``lora-merge``.
        known: the commands by name.
    """
    if isinstance(error, UnknownCommandError):
        from lora_merge.cli.commands import about_unknown_command

        return about_unknown_command(arguments, known)
    if isinstance(error, click.BadOptionUsage) and error.ctx is None:
        # click's parser does not say which command it parsed.
        return _about_options(error, known.get(arguments[0], known["merge"]), arguments)
    if error.ctx is None or error.ctx.command.name not in known:
        return None
    if isinstance(error, StrayTextError) and error.texts[0] in known and arguments[0] not in known:
        from lora_merge.cli.advice import about_late_command

        return about_late_command(known[error.texts[0]], arguments)
    return _about_options(error, error.ctx.command, arguments)


def _about_options(
    error: click.UsageError, command: click.Command, arguments: Sequence[str]
) -> Advice | None:
    """Return what to say about the options of a command."""
    from lora_merge.cli.advice import Advice, about_missing, about_unknown_options, help_hint, reading_of
    from lora_merge.cli.bare_paths import about_bare_paths
    from lora_merge.cli.wrong_values import (
        about_missing_argument,
        about_missing_value,
        about_wrong_path,
        about_wrong_value,
    )

    read = reading_of(command, arguments)
    found: Advice | None = None
    match error:
        case click.NoSuchOption() if any(not word.is_known for word in read.words):
            found = about_unknown_options(read)
        case StrayTextError() if read.verb in {"merge", "plan"}:
            found = about_bare_paths(error.texts, read)
        case StrayTextError():
            listed = " ".join(f"`{text}`" for text in error.texts)
            found = Advice(f"unexpected argument {listed}", (help_hint(read),))
        case MissingOptionError():
            found = about_missing(error.name, "; a --config file can give it, too", read)
        case click.MissingParameter(param=click.Option() as param):
            found = about_missing(param.name or "", "", read)
        case click.MissingParameter():
            found = about_missing_argument(error, read)
        case click.BadParameter(param=click.Parameter(type=click.Path())):
            found = about_wrong_path(error)
        case click.BadParameter():
            found = about_wrong_value(error, read)
        case click.BadOptionUsage():
            found = about_missing_value(error, read)
    return found
