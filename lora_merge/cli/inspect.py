"""``lora-merge inspect``: what an adapter is, and which engines serve it as it is."""

from __future__ import annotations

import sys
from typing import Any

import click

from lora_merge.cli import exits
from lora_merge.cli.help_pages import Verb
from lora_merge.cli.options import SETTINGS, console_of, options
from lora_merge.cli.reports import page_file
from lora_merge.cli.torch_ahead import load_for_inspect


@click.command(cls=Verb, context_settings=SETTINGS)
@options("inspect")
def inspect(*, full: bool, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Describe an adapter and which engines can serve it.

    Shows the kind, rank and scale of every module, and the origin of the adapter. With --base, the adapter is also
    compared with the base, and the relative size of its change, ‖Δ‖/‖W‖, is measured for every module.

    \b
    Examples:
      lora-merge inspect my-lora
      lora-merge inspect my-lora --base Llama-3-8B --plot my-lora.html
      lora-merge inspect org/my-lora@v1 --engine vllm --json
    """
    # Before the imports that follow, which take as long.
    load_for_inspect(flags)
    from lora_merge.inspection.run import inspect_adapter
    from lora_merge.reporting.subject import subject_of
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import InspectRequest

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(InspectRequest, flags)
    with page_file(request.report, subject_of("inspect", request), quiet=quiet) as page:
        with console.watching() as observer:
            found = page.show(inspect_adapter(request, observer=observer))
        console.inspection(found, full=full)
        if any(issue.severity == "error" for issue in found.issues):
            sys.exit(exits.PLAN)
