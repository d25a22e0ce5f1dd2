"""``lora-merge convert``: rewrites an adapter for an engine, in another format, or with another rank."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.options import SETTINGS, console_of, options


@click.command(context_settings=SETTINGS)
@options("convert")
def convert(*, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Rewrite an adapter, from its files alone: for an engine, in another format, with another rank.

    \b
    Examples:
      lora-merge convert my-lora --for vllm --rank 16 --out my-lora-vllm
      lora-merge convert my-lora --for lmdeploy --base Qwen2.5-7B --out my-lora-lmdeploy
      lora-merge convert my-lora --for llamacpp --base Llama-3-8B --out my-lora-gguf
      lora-merge convert my-dora --to-lora --energy 0.99 --base Llama-3-8B --out my-lora
      lora-merge convert my-lora --bake-scale --expand-targets --out plain
    """
    from lora_merge.conversion.run import convert_adapter
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import ConvertRequest

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(ConvertRequest, flags)
    with console.watching() as observer:
        report = convert_adapter(request, observer=observer)
    console.conversion(report)
