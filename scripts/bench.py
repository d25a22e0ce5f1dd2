"""Time merges against copying the base, PEFT's own merge and other tools, on synthetic Llamas.

Every measured command is a fresh process. The contenders take turns, every second round in reverse order, so a slow
minute of the machine meets all of them, and ratios are taken round by round. lora-merge with another number of workers
is another contender.

Options that take a list take 1,2 or are repeated; every combination of size, dtype, targets and rank is a case.
`install-peer` makes another tool a contender; `table` and `plot` show the results that a run saved.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from benchmarks import buckets, requantised, results, running, stages, stored, tables, together
from benchmarks import roundings as roundings_bench
from benchmarks.cases import ITEM_BYTES, KINDS, TARGETS, Case, cases, listed
from benchmarks.commands import MORE
from benchmarks.contenders import GROUPS, contenders
from benchmarks.machine import ROOT, machine, machine_line
from benchmarks.measure import CACHES, RunError
from benchmarks.peers import PEERS, install
from click.core import ParameterSource
from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Command = TypeVar("Command", bound="Callable[..., Any]")

CACHE_DIR = ROOT / ".bench"
PAGE = ROOT / "docs" / "performance.md"
PICTURE = ROOT / "docs" / "performance.png"
UNTOLD = ("cache_dir", "json_file", "keep", "before")
"""Options that change no number: they are not recorded, and paths are nobody's business."""

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
AT_LEAST_ONE = click.IntRange(min=1)
CACHE_DIR_OPTION = click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=CACHE_DIR,
    help="For inputs, outputs and other tools.  [default: .bench]",
)


@click.group(invoke_without_command=True, help=__doc__)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    default=("3",),
    callback=listed(click.FloatRange(min=0, min_open=True)),
    help="GB of the base.  [default: 3]",
)
@click.option(
    "--rank",
    "ranks",
    multiple=True,
    default=("16",),
    callback=listed(AT_LEAST_ONE),
    help="Of the adapter.  [default: 16]",
)
@click.option(
    "--targets",
    multiple=True,
    default=("all",),
    callback=listed(click.Choice(list(TARGETS))),
    help=f"Modules of the adapter: {', '.join(TARGETS)}.  [default: all]",
)
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("bfloat16",),
    callback=listed(click.Choice(list(ITEM_BYTES))),
    help=f"Of the base: {', '.join(ITEM_BYTES)}.  [default: bfloat16]",
)
@click.option(
    "--workers",
    multiple=True,
    callback=listed(AT_LEAST_ONE),
    help="Of lora-merge; each number is a contender.  [default: its own]",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    default=(KINDS[0],),
    callback=listed(click.Choice(KINDS)),
    help=f"Of adapter: {', '.join(KINDS)}. lora-merge merges each, the others the first.  [default: lora]",
)
@click.option(
    "--loaded",
    is_flag=True,
    help="lora-merge takes part a second time, as ours-loaded, in processes that have torch loaded already.",
)
@click.option(
    "--before",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Another checkout of lora-merge, which takes part as ours-before: what a change costs.",
)
@click.option("--runs", type=AT_LEAST_ONE, default=5, show_default=True, help="Rounds.")
@click.option(
    "--peer-runs", type=AT_LEAST_ONE, help="Rounds that PEFT and other tools take part in.  [default: all]"
)
@click.option(
    "--peers-at",
    multiple=True,
    callback=listed(click.FloatRange(min=0, min_open=True)),
    help="Sizes that PEFT and other tools take part at.  [default: all]",
)
@click.option(
    "--cache",
    type=click.Choice(list(CACHES)),
    default="warm",
    show_default=True,
    help="Inputs are read into the page cache before every run, or put out of it.",
)
@click.option("--only", multiple=True, callback=listed(click.Choice(GROUPS)), help=f"Of {', '.join(GROUPS)}.")
@click.option("--skip", multiple=True, callback=listed(click.Choice(GROUPS)), help="The same.")
@click.option(
    "--settle", "settle_s", default=5.0, show_default=True, help="Seconds of rest before every run."
)
@CACHE_DIR_OPTION
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Results, written after every case.  [default: a new file in the cache]",
)
@click.option(
    "--keep",
    is_flag=True,
    help="Keep the inputs that this run builds; what was in the cache before stays anyway.",
)
@click.pass_context
def main(ctx: click.Context, /, **flags: Any) -> None:
    if ctx.invoked_subcommand is None:
        bench(command_line(ctx), **flags)


def command_line(ctx: click.Context) -> str:
    """Return the command that was given, with what its numbers depend on and nothing else."""
    words = ["python", "scripts/bench.py"]
    for param in ctx.command.params:
        name = param.name or ""
        if name in UNTOLD or ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
            continue
        value = ctx.params[name]
        if value is True:
            words.append(param.opts[0])
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [
            param.opts[0],
            ",".join(f"{each:g}" if isinstance(each, float) else str(each) for each in values),
        ]
    return " ".join(words)


def bench(command: str, /, **flags: Any) -> None:
    """Measure every case, print a table of each, and write the results."""
    todo = cases(*(flags.pop(name) for name in ("sizes", "dtypes", "targets", "ranks")))
    only, skip, workers, json_file = (flags.pop(name) for name in ("only", "skip", "workers", "json_file"))
    loaded, before = flags.pop("loaded"), flags.pop("before")
    flags["cache_dir"] = flags["cache_dir"].absolute()
    flags["peer_runs"] = flags["peer_runs"] or flags["runs"]
    options = running.Options(**flags)
    options.cache_dir.mkdir(parents=True, exist_ok=True)
    groups = [group for group in only or GROUPS if group not in skip]
    entrants = contenders(groups, options.kinds, workers, options.cache_dir, loaded=loaded, before=before)
    check(options, only, {entrant.group for entrant in entrants})
    versions = {entrant.name: dict(entrant.versions) for entrant in entrants if entrant.versions}
    about = machine(options.cache_dir)
    made = results.Results(command, time.strftime("%Y-%m-%d"), options.cache, about, versions)
    file = json_file or options.cache_dir / time.strftime("results-%Y%m%d-%H%M%S.json")
    say(machine_line(about), f"contenders: {', '.join(entrant.name for entrant in entrants)}")

    console = Console()
    console.width = max(console.width, 110)  # rather folded by the terminal than cut

    def done(outcome: results.Outcome) -> None:
        made.outcomes.append(outcome)
        made.write(file)
        console.print(tables.console_table(outcome))
        say(*tables.console_notes(outcome))

    try:
        running.run_all(options, todo, entrants, done)
    except (RunError, running.RoomError) as exc:
        raise click.ClickException(str(exc)) from exc
    say(*tables.method_of(made), *tables.flatness(made), f"results: {file}")


def check(options: running.Options, only: tuple[str, ...], groups: set[str]) -> None:
    """Refuse what cannot be measured.

    Raises:
        click.ClickException: nobody is left, somebody who was asked for is missing, or the system has no way.
    """
    for group in only:
        if group in PEERS and group not in groups:
            why = PEERS[group].unusable or f"not installed: python scripts/bench.py install-peer {group}"
            raise click.ClickException(f"{group} is {why}")
    if not groups:
        raise click.UsageError("--only and --skip leave no contender")
    if options.cache == "cold" and not hasattr(os, "posix_fadvise"):
        raise click.ClickException("--cache cold needs posix_fadvise, which this system does not have")


def say(*lines: str) -> None:
    """Print lines as they are."""
    for line in lines:
        click.echo(line)


@main.command("install-peer")
@click.argument("name", type=click.Choice(list(PEERS)))
@CACHE_DIR_OPTION
def install_peer(name: str, cache_dir: Path) -> None:
    """Install another tool, into a virtual environment of its own in the cache."""
    peer = PEERS[name]
    if peer.unusable:
        raise click.ClickException(f"{name} takes no part: {peer.unusable}")
    try:
        install(peer, cache_dir.absolute())
    except subprocess.CalledProcessError as exc:
        raise click.ClickException(f"{name} cannot be installed; what pip says is above") from exc
    say(
        f"{name}: {', '.join(f'{package} {version}' for package, version in peer.versions(cache_dir).items())}"
    )


def turns(size: float, rounds: int, settle_s: float | None, cache: str = "") -> Callable[[Command], Command]:
    """Return a decorator with the options of commands whose merges take turns.

    Args:
        size: default of ``--size``.
        rounds: default of ``--rounds``.
        settle_s: default of ``--settle``; None without that option.
        cache: default of ``--cache``; empty without that option.
    """
    options = [
        click.option(
            "--size",
            type=click.FloatRange(min=0, min_open=True),
            default=size,
            help=f"GB of the base.  [default: {size:g}]",
        ),
        click.option(
            "--rounds", type=AT_LEAST_ONE, default=rounds, help=f"Turns of each side.  [default: {rounds}]"
        ),
        CACHE_DIR_OPTION,
    ]
    if cache:
        options.append(
            click.option(
                "--cache",
                type=click.Choice(list(CACHES)),
                default=cache,
                help=f"Inputs in the page cache before each run, or put out of it.  [default: {cache}]",
            )
        )
    if settle_s is not None:
        options.append(
            click.option(
                "--settle",
                "settle_s",
                default=settle_s,
                help=f"Seconds of rest before every run.  [default: {settle_s:g}]",
            )
        )

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def tell(lines: Iterator[str]) -> None:
    """Say each line as it comes; a run that fails ends the command with a sentence."""
    try:
        for line in lines:
            say(line)
    except RunError as exc:
        raise click.ClickException(str(exc)) from exc


@main.command()
@turns(3.0, 3, None, "warm")
@click.option(
    "--targets",
    type=click.Choice(list(TARGETS)),
    default="all",
    help="Modules of the adapters.  [default: all]",
)
@click.option("--adapters", type=AT_LEAST_ONE, default=4, help="How many.  [default: 4]")
def batch(size: float, targets: str, adapters: int, rounds: int, cache: str, cache_dir: Path) -> None:
    """Time separate merges into one base against one batch of them."""
    of_one_base = [Case(size, "bfloat16", targets, 16 + n) for n in range(adapters)]
    tell(together.rounds_of(cache_dir.absolute(), of_one_base, rounds, cache))


@main.command()
@turns(3.0, 5, 5.0, "warm")
def storages(size: float, rounds: int, cache: str, settle_s: float, cache_dir: Path) -> None:
    """Time merges into a base in FP8, decoded and carried, against merges into one in BF16."""
    tell(stored.rounds_of(cache_dir.absolute(), size, rounds, cache, settle_s))


@main.command()
@turns(1.0, 5, 2.0, "warm")
def roundings(size: float, rounds: int, cache: str, settle_s: float, cache_dir: Path) -> None:
    """Time merges that round and quantise in several ways, and PEFT's."""
    tell(roundings_bench.rounds_of(cache_dir.absolute(), size, rounds, cache, settle_s))


@main.command("stages")
@turns(1.0, 3, 2.0)
def stages_of(size: float, rounds: int, settle_s: float, cache_dir: Path) -> None:
    """Show how fast each stage of the merge loop is, by storage of the base, with one worker."""
    tell(stages.rounds_of(cache_dir.absolute(), size, rounds, settle_s))


@main.command("requantised")
@turns(1.0, 5, 2.0)
@click.option(
    "--scheme",
    "schemes",
    multiple=True,
    default=tuple(stages.SCHEMES),
    callback=listed(click.Choice(list(stages.SCHEMES))),
    help="Storages of the bases; they take 2 to 5 times the size on the disk each.  [default: all]",
)
def requantised_merges(
    size: float, rounds: int, settle_s: float, schemes: tuple[str, ...], cache_dir: Path
) -> None:
    """Time merges that keep the storage of a quantised base, and verify, against BF16 bases of as many bytes."""
    tell(requantised.rounds_of(cache_dir.absolute(), size, schemes, rounds, settle_s))


@main.command()
@turns(0.5, 5, 2.0)
@click.option("--merges-only", is_flag=True, help="Without the copies: for memory at larger sizes.")
def stores(size: float, rounds: int, settle_s: float, merges_only: bool, cache_dir: Path) -> None:
    """Time merges from a bucket into a bucket against plain copies, on SeaweedFS (make stores-servers)."""
    tell(buckets.rounds_of(cache_dir.absolute(), size, rounds, settle_s, merges_only=merges_only))


@main.command()
@CACHE_DIR_OPTION
def peers(cache_dir: Path) -> None:
    """List the other tools, what they leave, and whether they are installed."""
    for peer in PEERS.values():
        versions = peer.versions(cache_dir).get(peer.package)
        state = peer.unusable or (f"installed, {versions}" if versions else "not installed")
        say(f"{peer.name}: {peer.output}; {state}")


@main.command()
@click.argument("name", type=click.Choice(list(tables.KINDS)))
@click.argument("file", type=FILE)
@click.option(
    "--page", type=FILE, default=PAGE, help="Where its markers are.  [default: docs/performance.md]"
)
def table(name: str, file: Path, page: Path) -> None:
    """Put the table NAME of the results in FILE between its markers in the page."""
    try:
        tables.write_block(page, name, tables.markdown(name, results.read(file)))
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc


@main.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=PICTURE,
    help="A PNG file.  [default: docs/performance.png]",
)
def plot(files: tuple[Path, ...], out: Path) -> None:
    """Draw time and peak memory against size, from the results in FILES together."""
    from benchmarks.plot import draw

    try:
        draw([results.read(file) for file in files], out)
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc


for more, command in MORE.items():
    main.add_command(CACHE_DIR_OPTION(command), more)

if __name__ == "__main__":
    main()
