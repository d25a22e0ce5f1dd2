"""Options that commands share, and how their values are parsed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_merge.core.request import PARSERS

if TYPE_CHECKING:
    from collections.abc import Callable

Command = TypeVar("Command", bound="Callable[..., Any]")


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """The value of one field of a request, checked by the request's own parser.

    Args:
        field: a key of `PARSERS`.
    """

    def __init__(self, field: str) -> None:
        self.name = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value, or fail with the parser's sentence."""
        try:
            return PARSERS[self.name](value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


def output_options(command: Command) -> Command:
    """Add the options that choose how a command speaks."""
    for option in (
        click.option(
            "-v", "--verbose", is_flag=True, help="Name every tensor as it is done; time each phase."
        ),
        click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."),
    ):
        command = option(command)
    return command
