"""``lora-merge merge``: one base, one adapter or several, one output."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.options import SETTINGS, console_of, options, request_of


@click.command(context_settings=SETTINGS)
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
    """Merge one adapter or several into their base model and write a plain Hugging Face checkpoint.

    \b
    Examples:
      lora-merge merge --base Llama-3-8B --adapter my-lora --out merged
      lora-merge merge --base Qwen/Qwen3-8B --adapter org/my-lora@v1 --out merged
      lora-merge merge --config merge.yaml --out merged
      lora-merge merge --base Llama-3-8B --adapter style:0.7 --adapter facts --out merged
    """
    from lora_merge import api

    if no_verify and flags["verify"]:
        raise click.UsageError("--verify and --no-verify exclude each other")
    if no_verify:
        flags["verify"] = "none"
    console = console_of(json=json, quiet=quiet, verbose=verbose, profile=profile)
    request = request_of("merge", config, flags)
    with console.watching() as observer:
        report = api.run(request, dry_run=dry_run, observer=observer)
    console.report(report)
