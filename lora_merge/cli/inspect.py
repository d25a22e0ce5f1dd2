"""``lora-merge inspect``: what an adapter is, and which engines serve it as it is."""

from __future__ import annotations

import sys
from typing import Any, get_args

import click

from lora_merge.cli import exits
from lora_merge.cli.options import base_options, console_of, hub_options, output_options
from lora_merge.core.choices import ServingEngine


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("adapter", metavar="ADAPTER")
@base_options
@click.option(
    "--engine", "serving", type=click.Choice(get_args(ServingEngine)), help="Report on this engine only."
)
@click.option("--full", is_flag=True, help="List every module, not groups of them.")
@click.option(
    "--plot",
    metavar="FILE",
    help="Draw a heat map of layers and modules into a .png, .svg or .html file: rank, and with a base how large the change is.",
)
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@hub_options
@output_options
def inspect(as_json: bool, quiet: bool, verbose: bool, full: bool, **flags: Any) -> None:
    """Describe an adapter: kind, rank and scale of every module, where it comes from, what engines make of it.

    Without a base only the adapter's own files are read. With --base it is held against the base, and ‖Δ‖/‖W‖ of every
    module is measured.

    \b
    Examples:
      lora-merge inspect my-lora
      lora-merge inspect my-lora --base Llama-3-8B --plot my-lora.html
      lora-merge inspect org/my-lora@v1 --engine vllm --json
    """
    from lora_merge.core.request import InspectRequest, parse_request
    from lora_merge.pipeline.inspecting import inspect_adapter

    console = console_of(as_json=as_json, quiet=quiet, verbose=verbose)
    request = parse_request(InspectRequest, flags)
    with console.watching() as observer:
        found = inspect_adapter(request, observer=observer)
    console.inspection(found, full=full)
    if any(issue.severity == "error" for issue in found.issues):
        sys.exit(exits.PLAN)
