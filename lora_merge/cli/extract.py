"""``lora-merge extract``: a LoRA of what a full fine-tune changed."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.help_pages import Verb
from lora_merge.cli.options import SETTINGS, check_given, console_of, options


@click.command(cls=Verb, context_settings=SETTINGS)
@options("extract")
def extract(*, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Turn a full fine-tune into a LoRA.

    Computes the difference between the fine-tuned model and its base, approximates it by a LoRA in PEFT's format,
    and reports how much is lost.

    \b
    Examples:
      lora-merge extract --base Llama-3-8B --tuned mine --rank 64 -o my-lora
      lora-merge extract --base Llama-3-8B --tuned mine --energy 0.9 -o my-lora
    """
    from lora_merge.conversion.extraction import extract_adapter
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import ExtractRequest

    check_given("extract", flags)
    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(ExtractRequest, flags)
    with console.watching() as observer:
        report = extract_adapter(request, observer=observer)
    console.conversion(report, request.out, request.base)
