"""The options of all commands, made from the table of options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_merge.cli.usage import MissingOptionError
from lora_merge.requests.table import fields_of, options_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_merge.cli.console import Console
    from lora_merge.requests.option import Names, Option, Verb
    from lora_merge.requests.request import Request

Command = TypeVar("Command", bound="Callable[..., Any]")

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
"""click's settings for every command."""

_FILES = {
    "existing": click.Path(exists=True, dir_okay=False),
    "new": click.Path(dir_okay=False),
    "any": click.Path(),
}


class Parsed(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A click type that checks a value with the parser of the table.

    Args:
        option: a row of the table. Its parser raises ``ValueError`` with a sentence.
    """

    def __init__(self, option: Option) -> None:
        self.name = option.name
        self._parse = option.kind.parse
        self._names = option.kind.names

    def get_metavar(self, *context: Any, **more: Any) -> str | None:
        """Return the names that the value may be, as the help shows them; None where there are none."""
        del context, more  # click 8.2 gives its context, too
        return None if self._names is None else f"[{'|'.join(self._names())}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value, or fail with the parser's sentence as a usage error."""
        try:
            return value if self._parse is None else self._parse(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


class Named(click.ParamType):  # type: ignore[type-arg]
    """One of the names of a table, refused as a ``click.Choice`` does, by the members that the table has then."""

    name = "choice"

    def __init__(self, names: Names) -> None:
        self._names = names

    def get_metavar(self, *context: Any, **more: Any) -> str | None:
        """Return the names, as the help shows them."""
        return click.Choice(self._names()).get_metavar(*context, **more)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name, or fail with click's own sentence."""
        return click.Choice(self._names()).convert(value, param, ctx)


def options(verb: Verb) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options of a verb, in the table's order."""

    def add(command: Command) -> Command:
        # Decorators apply from the last to the first.
        for option in reversed(options_of(verb)):
            command = _parameter(option, verb)(command)
        return command

    return add


def _parameter(option: Option, verb: Verb) -> Callable[[Command], Command]:
    """Return click's decorator for one option."""
    kind = option.kind
    if option.is_positional:
        return click.argument(
            option.name, metavar=option.name.upper(), type=_type(option), shell_complete=_completer(option)
        )
    settings: dict[str, Any] = {"help": option.help + (f"  [{option.note}]" if option.note else "")}
    if option.sets:
        settings["flag_value"] = option.sets
    elif option.is_switch:
        # None means not given. Then a file, or the request's own default, decides.
        settings["default"] = False if option.scope == "command" else None
        settings["is_flag"] = None if option.can_be_off else True
    else:
        settings |= {
            "type": _type(option),
            "shell_complete": _completer(option),
            "metavar": kind.metavar or None,
            "multiple": kind.is_many,
            "envvar": option.environment or None,
            # With ``--config``, `request_of` checks this, when both sources are known.
            "required": option.is_required and not option.instead and not _has_file(verb),
        }
        if option.scope == "command" and not kind.is_many:
            settings["default"] = option.default
    return click.option(*_names(option), **settings)


def _completer(option: Option) -> Any:
    """Return what offers values of an option to a shell. The module is loaded only when a shell asks."""

    def offer(ctx: click.Context, param: click.Parameter, incomplete: str) -> Any:
        from lora_merge.cli.completing import completer

        found = completer(option)
        return found(ctx, param, incomplete) if found else []

    return offer


def _names(option: Option) -> list[str]:
    """Return click's declarations of an option: short name, flag (with ``/--no-…``), and the function's parameter."""
    flag = option.flag or f"--{option.name.replace('_', '-')}"
    names = [name for name in (option.short, flag) if name]
    if option.can_be_off:
        names[-1] += f"/--no-{flag[2:]}"
    return [*names, option.name]


def _type(option: Option) -> Any:
    """Return click's type of an option, None for plain text."""
    kind = option.kind
    if kind.choices:
        return click.Choice(kind.choices)
    if kind.names is not None and kind.is_completed:
        return Named(kind.names)
    if kind.file:
        return _FILES[kind.file]
    # An option that may be repeated is parsed later, when all its values are known.
    is_text = kind.parse is None or kind.is_many or kind.is_path
    return None if is_text else Parsed(option)


def _has_file(verb: Verb) -> bool:
    """Return True if a verb has ``--config``."""
    return any(option.name == "config" for option in options_of(verb))


def console_of(*, json: bool, quiet: bool, verbose: bool, profile: bool = False) -> Console:
    """Return the console of a command.

    Raises:
        click.UsageError: both ``--quiet`` and ``--verbose`` are given.
    """
    from lora_merge.cli.console import Console

    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    return Console(as_json=json, quiet=quiet, verbose=verbose, profile=profile)


def given_values() -> dict[str, Any]:
    """Return the options that the user gave the present command, here or in the environment, with their values."""
    context = click.get_current_context()
    sources = (click.core.ParameterSource.COMMANDLINE, click.core.ParameterSource.ENVIRONMENT)
    return {
        name: value for name, value in context.params.items() if context.get_parameter_source(name) in sources
    }


def check_given(verb: Verb, flags: dict[str, Any]) -> None:
    """Check that each required option of a command without ``--config`` is given, or the one that stands for it.

    Raises:
        click.MissingParameter: neither is.
    """
    context = click.get_current_context()
    for option in fields_of(verb):
        if option.instead and not (flags[option.name] or flags[option.instead]):
            param = next(one for one in context.command.params if one.name == option.name)
            raise click.MissingParameter(ctx=context, param=param)


def request_of(verb: Verb, config: str | None, flags: dict[str, Any]) -> Request:
    """Return the request that a file and the flags give. Flags win.

    Args:
        verb: ``merge``, or ``plan``, which needs no output.
        config: the file of ``--config``, or None.
        flags: values of the command's options, by the names of their fields.

    Raises:
        click.UsageError: a required option is in neither.
        RequestError: a value does not parse.
    """
    from lora_merge.requests.parsing import left_out, parse_request
    from lora_merge.requests.request import Request

    given = {name: value for name, value in flags.items() if value not in (None, ())}
    needed = [option.name for option in fields_of(verb) if option.is_required]
    defaults = {} if "out" in needed else {"out": ""}
    if config is not None:
        from lora_merge.requests.request_file import read_request

        return read_request(config, given, defaults)
    for name in needed:
        if name not in given and name not in left_out(verb, given):
            raise MissingOptionError(name, click.get_current_context(silent=True))
    return parse_request(Request, given, defaults)
