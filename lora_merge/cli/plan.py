"""``lora-merge plan``: what a merge would do, and how one module was matched."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.help_pages import Verb
from lora_merge.cli.next_steps import again
from lora_merge.cli.options import SETTINGS, console_of, options, request_of
from lora_merge.cli.voice import say


@click.command(cls=Verb, context_settings=SETTINGS)
@options("plan")
def plan(
    *,
    config: str | None,
    explain: tuple[str, ...],
    survival: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Show what a merge would do, and write nothing.

    With --explain it shows how one module was matched: by which rule, to which stored tensor, and to which part
    of that tensor.

    \b
    Examples:
      lora-merge plan --base Llama-3-8B --adapter my-lora
      lora-merge plan --base Llama-3-8B --adapter my-lora --survival
      lora-merge plan --adapter my-lora --explain model.layers.0.mlp.up_proj
    """
    from lora_merge import api

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = request_of("plan", config, flags)
    with console.watching() as observer:
        if explain:
            matches = api.explain(request, explain, observer=observer)
        else:
            report = api.run(request, dry_run=True, survival=survival, observer=observer)
    if explain:
        console.matches(matches)
    else:
        more = {} if request.out else {"out": "merged"}
        console.report(report, {"base": request.base or "", "out": request.out}, again(**more))
        if survival and not report.foreseen and not (json or quiet):
            say("no weight that changes is rounded: the output holds it in float32")
