"""``lora-merge plan``: what a merge would do, and how one module was matched."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.options import input_options, output_options, request_of


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@input_options
@click.option(
    "--explain",
    multiple=True,
    metavar="MODULE",
    help="Say how this module or parameter was matched, by its name in the adapter or on disk. May be repeated.",
)
@output_options
def plan(
    config: str | None, explain: tuple[str, ...], as_json: bool, quiet: bool, verbose: bool, **flags: Any
) -> None:
    """Plan a merge, write nothing, and print the plan; or how one module was matched: by which rule, to which
    stored tensor, to which part of it.

    \b
    Examples:
      lora-merge plan --base Llama-3-8B --adapter my-lora
      lora-merge plan --base Qwen3-30B-A3B --adapter my-lora --explain model.layers.0.mlp.experts.3.up_proj
    """
    from lora_merge import pipeline
    from lora_merge.cli.console import Console

    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    request = request_of(config, flags, needed=("adapter",))
    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    with console.watching() as observer:
        if explain:
            matches = pipeline.explain(request, explain, observer=observer)
        else:
            report = pipeline.run(request, dry_run=True, observer=observer)
    if explain:
        console.matches(matches)
    else:
        console.report(report)
