"""``lora-merge merge``: one base, one adapter or several, one output."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.options import Parsed, input_options, output_options, request_of

_DIRECTORY = click.Path(file_okay=True, dir_okay=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@input_options
@click.option("--out", type=_DIRECTORY, metavar="DIR", help="Directory to create.  [required]")
@click.option(
    "--device",
    type=Parsed("device"),
    metavar="[auto|cpu|cuda|cuda:N]",
    help="Do the arithmetic here.  [default: auto, the CPU]",
)
@click.option(
    "--workers",
    type=Parsed("workers"),
    metavar="N",
    help="Worker threads, at most.  [default: the usable cores, up to 8]",
)
@click.option(
    "--memory-limit",
    type=Parsed("memory_limit"),
    metavar="SIZE",
    help="Hold no more than this in memory, such as 2GB: fewer workers and smaller tiles, or a refusal.  [default: what is free]",
)
@click.option(
    "--link",
    type=Parsed("link"),
    metavar="[copy|reflink|hard]",
    help="How weight files that nothing changes come into the output; a hard link is the base's own file under a second name.  [default: reflink where the filesystem has it, else copy]",
)
@click.option(
    "--verify",
    type=click.Choice(["sample", "full"]),
    help="Check the output before it gets its name: three rows of each merged tensor, or everything.  [default: sample]",
)
@click.option("--no-verify", is_flag=True, help="Do not check the output.")
@click.option(
    "--overwrite/--no-overwrite", default=None, help="Replace an existing output, once the new one is whole."
)
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Go on where an interrupted run to this output stopped, if it was the same merge; what it has written is checked first.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; nothing is written.")
@click.option("--profile", is_flag=True, help="Print where each second went.")
@output_options
def merge(
    config: str | None,
    dry_run: bool,
    profile: bool,
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
    request = request_of(config, flags, needed=("adapter", "out"))
    console = Console(as_json=as_json, quiet=quiet, verbose=verbose, profile=profile)
    with console.watching() as observer:
        report = pipeline.run(request, dry_run=dry_run, observer=observer)
    console.report(report)
