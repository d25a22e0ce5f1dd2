"""``lora-merge extract``: a LoRA of what a full fine-tune changed."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli.options import Parsed, console_of, hub_options, output_options


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--base", required=True, metavar="DIR|ID", help="What was trained.")
@click.option("--tuned", required=True, metavar="DIR|ID", help="What came of it.")
@click.option("--out", required=True, metavar="DIR", help="Directory to create.")
@click.option(
    "--rank", type=Parsed("rank"), metavar="N", help="Keep the N largest singular values of each change."
)
@click.option(
    "--energy",
    type=Parsed("energy"),
    metavar="SHARE",
    help="Keep as many as make up this share of the sum of their squares, such as 0.9; with --rank, at most N.",
)
@click.option(
    "--target",
    multiple=True,
    metavar="NAME",
    help="Take modules whose paths end in this, such as q_proj; may be repeated.  [default: all that LoRA can hold]",
)
@click.option(
    "--save-modules", is_flag=True, help="Carry whole what no LoRA holds: embeddings, norms, biases."
)
@click.option(
    "--dtype",
    type=Parsed("dtype"),
    metavar="[bfloat16|float16|float32]",
    help="Store the factors in this dtype.  [default: float32]",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is whole.")
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@hub_options
@output_options
def extract(as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Take a full fine-tune apart: a PEFT LoRA of what it changed in its base, and what that loses.

    \b
    Examples:
      lora-merge extract --base Llama-3-8B --tuned my-model --rank 64 --out my-lora
      lora-merge extract --base Llama-3-8B --tuned my-model --energy 0.9 --save-modules --out my-lora
    """
    from lora_merge.core.request import ExtractRequest, parse_request
    from lora_merge.pipeline.extracting import extract_adapter

    console = console_of(as_json=as_json, quiet=quiet, verbose=verbose)
    request = parse_request(ExtractRequest, flags)
    with console.watching() as observer:
        report = extract_adapter(request, observer=observer)
    console.conversion(report)
