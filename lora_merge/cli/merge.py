"""``lora-merge merge``: one base, one adapter or several, one output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lora_merge.cli.options import Parsed, output_options
from lora_merge.core.request import EXPERT_LAYOUTS

if TYPE_CHECKING:
    from lora_merge.core.request import Request

_DIRECTORY = click.Path(file_okay=True, dir_okay=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--base",
    metavar="DIR|ID",
    help="Base model: a directory, or org/name[@revision] on the Hub.  [default: the one that the adapter names]",
)
@click.option(
    "--adapter",
    multiple=True,
    metavar="DIR|ID[:WEIGHT]",
    help="Adapter to merge (a directory, or org/name[/folder][@revision] on the Hub), and how much of it; repeat it to merge several.  [required; WEIGHT: 1]",
)
@click.option("--out", type=_DIRECTORY, metavar="DIR", help="Directory to create.  [required]")
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Read these options from a YAML file; those given here win.",
)
@click.option(
    "--base-is",
    type=Parsed("base_is"),
    metavar="[original|residual]",
    help="What the base is to a PiSSA, OLoRA, CorDA, LoftQ or LoRA-GA adapter: the model as published, or what the initialisation left of it.",
)
@click.option(
    "--expert-layout",
    type=click.Choice(EXPERT_LAYOUTS),
    multiple=True,
    help="What cannot be seen of stacked experts: how the base stores a square one in the adapter's terms; Unsloth's packing of B. May be repeated.",
)
@click.option(
    "--combine",
    type=Parsed("combine"),
    metavar="[linear|ties|dare_linear|dare_ties|svd]",
    help="How several adapters become one change of each weight.  [default: linear, their weighted sum]",
)
@click.option(
    "--density",
    type=Parsed("density"),
    metavar="SHARE",
    help="Share of each change that ties and dare keep.  [default: 0.5]",
)
@click.option("--seed", type=Parsed("seed"), metavar="N", help="Of what dare drops.  [default: 0]")
@click.option(
    "--dtype",
    type=Parsed("dtype"),
    metavar="[bfloat16|float16|float32]",
    help="Store the weights in this dtype.  [default: the base's, tensor by tensor]",
)
@click.option(
    "--device",
    type=Parsed("device"),
    metavar="[auto|cpu|cuda|cuda:N]",
    help="Do the arithmetic here.  [default: auto, the CPU]",
)
@click.option(
    "--workers", type=Parsed("workers"), metavar="N", help="Worker threads.  [default: all usable cores]"
)
@click.option(
    "--max-shard-size",
    type=Parsed("max_shard_size"),
    metavar="SIZE",
    help="Split the weights into files of at most this size, such as 5GB.  [default: the base's own files]",
)
@click.option(
    "--verify",
    type=click.Choice(["sample", "full"]),
    help="Check the output before it gets its name: three rows of each merged tensor, or everything.  [default: sample]",
)
@click.option("--no-verify", is_flag=True, help="Do not check the output.")
@click.option(
    "--allow-untie",
    is_flag=True,
    default=None,
    help="Untie the embeddings even of a family that engines tie whatever its config says.",
)
@click.option(
    "--allow-svd",
    is_flag=True,
    default=None,
    help="Merge OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it otherwise.",
)
@click.option(
    "--overwrite/--no-overwrite", default=None, help="Replace an existing output, once the new one is whole."
)
@click.option("--strict/--no-strict", default=None, help="Treat warnings as errors.")
@click.option(
    "--token",
    type=Parsed("token"),
    metavar="TEXT",
    help="For private and gated repos of the Hub; safer in HF_TOKEN, which no list of processes shows.  [default: HF_TOKEN, or the login]",
)
@click.option(
    "--offline/--no-offline",
    default=None,
    help="Take models and adapters from the local cache, and ask no hub.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written.")
@output_options
def merge(
    config: str | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    no_verify: bool,
    **flags: Any,
) -> None:
    """Merge one adapter or several into their base model and write a plain Hugging Face checkpoint.

    \b
    Examples:
      lora-merge merge --base Llama-3-8B --adapter my-lora --out merged
      lora-merge merge --base Qwen/Qwen3-8B --adapter org/my-lora@v1 --out merged
      lora-merge merge --config merge.yaml --out merged
      lora-merge merge --base Llama-3-8B --adapter style:0.7 --adapter facts --out merged
    """
    from lora_merge import pipeline
    from lora_merge.cli.console import Console

    if no_verify and flags["verify"]:
        raise click.UsageError("--verify and --no-verify exclude each other")
    if no_verify:
        flags["verify"] = "none"
    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    request = _request(config, {name: value for name, value in flags.items() if value not in (None, ())})
    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    with console.watching() as observer:
        report = pipeline.run(request, dry_run=dry_run, observer=observer)
    console.report(report)


def _request(config: str | None, flags: dict[str, Any]) -> Request:
    """Return the request of a file and of the flags, which win."""
    from lora_merge.core.request import Request, parse_fields

    if config is not None:
        from lora_merge.io.request_file import read_request

        return read_request(config, flags)
    for name in ("adapter", "out"):
        if name not in flags:
            raise click.UsageError(f"Missing option '--{name}'. It can also stand in a --config file.")
    return Request(**parse_fields(flags))
