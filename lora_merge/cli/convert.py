"""``lora-merge convert``: an adapter rewritten so that the engine which has to serve it understands it."""

from __future__ import annotations

from typing import Any, get_args

import click

from lora_merge.cli.options import Parsed, base_options, console_of, hub_options, output_options
from lora_merge.core.choices import AdapterFormat, ServingEngine


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("adapter", metavar="ADAPTER")
@click.option("--out", required=True, metavar="DIR", help="Directory to create.")
@click.option(
    "--for",
    "serving",
    type=click.Choice(get_args(ServingEngine)),
    help="Do whatever this engine needs, by the rules that inspect reports, and check that it is enough.",
)
@click.option(
    "--expand-targets", is_flag=True, help="List the modules in place of a regex, layers and exclusions."
)
@click.option("--bake-scale", is_flag=True, help="Fold rsLoRA, α and its patterns into B: α/r is 1 then.")
@click.option(
    "--rank",
    type=Parsed("rank"),
    metavar="N",
    help="Keep the N largest singular values of each module's change, at most; says what is lost. A smaller rank stays: see --pad-rank.",
)
@click.option(
    "--energy",
    type=Parsed("energy"),
    metavar="SHARE",
    help="Keep as many as make up this share of the sum of their squares, such as 0.99.",
)
@click.option(
    "--pad-rank", type=Parsed("pad_rank"), metavar="N", help="Give every module the rank N, with zeros."
)
@click.option(
    "--to-lora",
    is_flag=True,
    help="Make plain LoRA of any other kind: AdaLoRA exactly; DoRA, LoHa, IA3, OFT, whole modules and so on by --rank or --energy of what they change in the base.",
)
@click.option("--rename", type=click.Choice(["v4", "v5"]), help="Name modules as transformers 4 or 5 does.")
@click.option("--split-experts", "experts", flag_value="split", help="LoRA on every expert by itself.")
@click.option(
    "--fuse-experts", "experts", flag_value="fuse", help="LoRA on the parameters that hold all experts."
)
@click.option(
    "--dtype",
    type=Parsed("dtype"),
    metavar="[bfloat16|float16|float32]",
    help="Store the factors in this dtype.  [default: the adapter's, where it holds them exactly, else float32]",
)
@click.option(
    "--format",
    type=click.Choice(get_args(AdapterFormat)),
    help="Write PEFT's files, a GGUF file for llama.cpp, or mlx-lm's files.  [default: peft]",
)
@base_options
@click.option(
    "--allow-svd",
    is_flag=True,
    help="Take apart OSF, PSOFT and AdaMSS, which decompose the base anew; another machine may do it otherwise.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output, once the new one is whole.")
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@hub_options
@output_options
def convert(as_json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Rewrite an adapter, from its files alone: for an engine, in another format, with another rank.

    \b
    Examples:
      lora-merge convert my-lora --for vllm --rank 16 --out my-lora-vllm
      lora-merge convert my-lora --for lmdeploy --base Qwen2.5-7B --out my-lora-lmdeploy
      lora-merge convert my-lora --for llamacpp --base Llama-3-8B --out my-lora-gguf
      lora-merge convert my-dora --to-lora --energy 0.99 --base Llama-3-8B --out my-lora
      lora-merge convert my-lora --bake-scale --expand-targets --out plain
    """
    from lora_merge.core.request import ConvertRequest, parse_request
    from lora_merge.pipeline.converting import convert_adapter

    console = console_of(as_json=as_json, quiet=quiet, verbose=verbose)
    request = parse_request(ConvertRequest, flags)
    with console.watching() as observer:
        report = convert_adapter(request, observer=observer)
    console.conversion(report)
