"""``lora-merge extract``: a LoRA of what a full fine-tune changed."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.options import SETTINGS, console_of, options


@click.command(context_settings=SETTINGS)
@options("extract")
def extract(*, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Take a full fine-tune apart: a PEFT LoRA of what it changed in its base, and what that loses.

    \b
    Examples:
      lora-merge extract --base Llama-3-8B --tuned my-model --rank 64 --out my-lora
      lora-merge extract --base Llama-3-8B --tuned my-model --energy 0.9 --save-modules --out my-lora
    """
    from lora_merge.conversion.extraction import extract_adapter
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import ExtractRequest

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(ExtractRequest, flags)
    with console.watching() as observer:
        report = extract_adapter(request, observer=observer)
    console.conversion(report)
