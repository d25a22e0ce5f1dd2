"""``lora-merge convert``: rewrites an adapter for an engine, in another format, or with another rank."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.help_pages import Verb
from lora_merge.cli.next_steps import named_base
from lora_merge.cli.options import SETTINGS, check_given, console_of, options


@click.command(cls=Verb, context_settings=SETTINGS)
@options("convert")
def convert(*, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Rewrite an adapter for an engine, format or rank.

    Reads the adapter's files. The base is needed only where an option or an engine asks for it.

    \b
    Examples:
      lora-merge convert my-lora --for vllm --rank 16 -o my-lora-vllm
      lora-merge convert my-lora --for lmdeploy --base Qwen2.5-7B -o for-lmdeploy
      lora-merge convert my-lora --for llamacpp --base Llama-3-8B -o my-lora-gguf
      lora-merge convert my-dora --to-lora --rank 16 --base Llama-3-8B -o lora
      lora-merge convert my-lora --bake-scale --expand-targets -o plain
    """
    from lora_merge.conversion.run import convert_adapter
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import ConvertRequest

    check_given("convert", flags)
    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(ConvertRequest, flags)
    with console.watching() as observer:
        report = convert_adapter(request, observer=observer)
    console.conversion(report, request.out, request.base or named_base(request.out), request.serving)
