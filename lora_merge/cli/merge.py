"""``lora-merge merge``: one base, one adapter or several, one output."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.help_pages import Verb
from lora_merge.cli.next_steps import again
from lora_merge.cli.options import SETTINGS, console_of, options, request_of
from lora_merge.cli.reports import page_file
from lora_merge.cli.torch_ahead import load_for_merge


@click.command(cls=Verb, context_settings=SETTINGS)
@options("merge")
def merge(
    *,
    config: str | None,
    no_verify: bool,
    dry_run: bool,
    profile: bool,
    json: bool,
    quiet: bool,
    verbose: bool,
    **flags: Any,
) -> None:
    """Merge LoRA adapters into their base model.

    The output is a plain Hugging Face checkpoint, which any engine loads without LoRA support. The word "merge"
    can be left out.

    \b
    Examples:
      lora-merge merge --base Llama-3-8B --adapter my-lora -o merged
      lora-merge merge --base Qwen/Qwen3-8B --adapter org/my-lora@v1 -o merged
      lora-merge merge --config merge.yaml -o merged
      lora-merge merge --adapter style:0.7 --adapter facts -o merged
    """
    # Before the imports that follow, which take as long.
    if not dry_run:
        load_for_merge(flags)
    from lora_merge import api
    from lora_merge.reporting.subject import subject_of

    if no_verify and flags["verify"]:
        raise click.UsageError("--verify and --no-verify exclude each other")
    if no_verify:
        flags["verify"] = "none"
    console = console_of(json=json, quiet=quiet, verbose=verbose, profile=profile)
    request = request_of("merge", config, flags)
    with page_file(request.report, subject_of("merge", request), quiet=quiet) as page:
        with console.watching() as observer:
            report = page.show(api.run(request, dry_run=dry_run, observer=observer))
        console.report(report, {"base": request.base or "", "out": request.out}, again() if dry_run else "")
