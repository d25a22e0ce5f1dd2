"""Options that commands share, and how their values are parsed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_merge.core.request import EXPERT_LAYOUTS, PARSERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lora_merge.cli.console import Console
    from lora_merge.core.request import Request

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


def input_options(command: Command) -> Command:
    """Add the options that say what is to be merged, into what, and how."""
    options = (
        click.option(
            "--base",
            metavar="DIR|ID",
            help="Base model: a directory, or org/name[@revision] on the Hub.  [default: the one that the adapter names]",
        ),
        click.option(
            "--adapter",
            multiple=True,
            metavar="DIR|ID[:WEIGHT]",
            help="Adapter to merge (a directory, or org/name[/folder][@revision] on the Hub), and how much of it; repeat it to merge several.  [required; WEIGHT: 1]",
        ),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False),
            metavar="FILE",
            help="Read these options from a YAML file; those given here win.",
        ),
        click.option(
            "--base-is",
            type=Parsed("base_is"),
            metavar="[original|residual]",
            help="What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter: the model as published, or what the initialisation left of it.",
        ),
        click.option(
            "--expert-layout",
            type=click.Choice(EXPERT_LAYOUTS),
            multiple=True,
            help="What cannot be seen of stacked experts: how the base stores a square one in the adapter's terms; Unsloth's packing of B. May be repeated.",
        ),
        ignore_file_option,
        click.option(
            "--combine",
            type=Parsed("combine"),
            metavar="[linear|ties|dare_linear|dare_ties|svd]",
            help="How several adapters become one change of each weight.  [default: linear, their weighted sum]",
        ),
        click.option(
            "--density",
            type=Parsed("density"),
            metavar="SHARE",
            help="Share of each change that ties and dare keep.  [default: 0.5]",
        ),
        click.option("--seed", type=Parsed("seed"), metavar="N", help="Of what dare drops.  [default: 0]"),
        click.option(
            "--dtype",
            type=Parsed("dtype"),
            metavar="[bfloat16|float16|float32]",
            help="Store the weights in this dtype.  [default: the base's, tensor by tensor]",
        ),
        click.option(
            "--max-shard-size",
            type=Parsed("max_shard_size"),
            metavar="SIZE",
            help="Split the weights into files of at most this size, such as 5GB.  [default: the base's own files]",
        ),
        click.option(
            "--allow-untie",
            is_flag=True,
            default=None,
            help="Untie the embeddings even of a family that engines tie whatever its config says.",
        ),
        click.option(
            "--allow-svd",
            is_flag=True,
            default=None,
            help="Merge OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it otherwise.",
        ),
        click.option(
            "--allow-again",
            is_flag=True,
            default=None,
            help="Merge an adapter into a base that has it merged into it already.",
        ),
    )
    strict = click.option("--strict/--no-strict", default=None, help="Treat warnings as errors.")
    return _with(options, hub_options(strict(command)))


def ignore_file_option(command: Command) -> Command:
    """Add the option that leaves files of an adapter's folder out."""
    return click.option(
        "--ignore-file",
        multiple=True,
        metavar="NAME",
        help="Leave this file of the adapter's folder out, though it may hold weights: a name, a folder, or a pattern such as 'model-*'. May be repeated.",
    )(command)


def base_options(command: Command) -> Command:
    """Add the options that say which base an adapter belongs to, and what cannot be seen of the two."""
    options = (
        click.option(
            "--base",
            metavar="DIR|ID",
            help="Base model: a directory, or org/name[@revision] on the Hub.  [default: none, or where one is needed the one that the adapter names]",
        ),
        click.option(
            "--base-is",
            type=Parsed("base_is"),
            metavar="[original|residual]",
            help="What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter.",
        ),
        click.option(
            "--expert-layout",
            type=click.Choice(EXPERT_LAYOUTS),
            multiple=True,
            help="What cannot be seen of stacked experts.",
        ),
        ignore_file_option,
    )
    return _with(options, command)


def console_of(*, as_json: bool, quiet: bool, verbose: bool) -> Console:
    """Return a command's voice.

    Raises:
        click.UsageError: it is to be quiet and verbose.
    """
    from lora_merge.cli.console import Console

    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    return Console(as_json=as_json, quiet=quiet, verbose=verbose)


def hub_options(command: Command) -> Command:
    """Add the options that say how a hub may be asked."""
    options = (
        click.option(
            "--token",
            type=Parsed("token"),
            metavar="TEXT",
            help="For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows.  [default: HF_TOKEN, or the login]",
        ),
        click.option(
            "--offline/--no-offline",
            default=None,
            help="Take models and adapters from the local cache, and ask no hub.",
        ),
    )
    return _with(options, command)


def _with(options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """Add options, the first one first in its help."""
    for option in reversed(options):
        command = option(command)
    return command


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


def request_of(config: str | None, flags: dict[str, Any], needed: tuple[str, ...]) -> Request:
    """Return the request of a file and of the flags, which win.

    Raises:
        click.UsageError: an option that is needed stands in neither.
    """
    from lora_merge.core.request import Request, parse_fields

    given = {name: value for name, value in flags.items() if value not in (None, ())}
    if config is not None:
        from lora_merge.io.request_file import read_request

        return read_request(config, given, defaults={} if "out" in needed else {"out": ""})
    for name in needed:
        if name not in given:
            raise click.UsageError(f"Missing option '--{name}'. It can also stand in a --config file.")
    return Request(**parse_fields({"out": "", **given}))
