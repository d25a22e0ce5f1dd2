"""``lora-merge verify``: is this output still what it was, and does it compute what base and adapter compute?"""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli import exits
from lora_merge.cli.options import Parsed, hub_options, ignore_file_option, output_options


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("out", metavar="OUT")
@click.option("--base", metavar="DIR|ID", help="What it was merged into.  [default: what its manifest names]")
@click.option(
    "--adapter",
    multiple=True,
    metavar="DIR|ID[:WEIGHT]",
    help="What was merged into it; repeat it for several.  [default: what its manifest names]",
)
@click.option(
    "--level",
    type=click.Choice(["structure", "sample", "full"]),
    help="sample: check every merged row by random projections, and recompute some; full: recompute all; structure: compare nothing.  [default: sample]",
)
@click.option(
    "--forward",
    is_flag=True,
    help="Run base and adapter, unmerged, and the merged checkpoint, and compare what they compute.",
)
@click.option(
    "--engine", type=Parsed("engine"), metavar="[vllm]", help="Ask this engine too, with no LoRA support."
)
@click.option(
    "--engine-python",
    envvar="LORA_MERGE_ENGINE_PYTHON",
    metavar="PATH",
    help="Python interpreter that has the engine.  [default: this one, or LORA_MERGE_ENGINE_PYTHON]",
)
@click.option(
    "--prompt",
    multiple=True,
    metavar="TEXT",
    help="Ask this; may be repeated.  [default: three texts, and tokens drawn from the vocabulary]",
)
@click.option(
    "--n-tokens",
    type=Parsed("n_tokens"),
    metavar="N",
    help="Tokens that each prompt is answered with.  [default: 8]",
)
@click.option(
    "--tolerance",
    type=Parsed("tolerance"),
    metavar="LOGITS",
    help="Largest difference of two logits that passes.  [default: what rounding to the stored dtype explains, measured]",
)
@click.option(
    "--dtype",
    type=Parsed("dtype"),
    metavar="[bfloat16|float16|float32]",
    help="What the models compute in; a half dtype takes half the memory and hides more.  [default: float32]",
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run the code that the checkpoint carries, where transformers has no class for the model.",
)
@ignore_file_option
@hub_options
@click.option("--strict", is_flag=True, help="Treat warnings as errors.")
@output_options
def verify(as_json: bool, quiet: bool, verbose: bool, strict: bool, **flags: Any) -> None:
    """Verify a merged checkpoint, now or years later: whether engines can load all of it; whether it is, byte by byte,
    what its manifest recorded; and where base and adapter are at hand, whether its tensors are theirs, recomputed.

    The last lines say what was checked and what was not. Where there is nothing to compare the output with (no manifest, no
    base and adapter), verification fails: --level structure asks for its structure alone.

    \b
    Examples:
      lora-merge verify merged
      lora-merge verify merged --forward
      lora-merge verify merged --forward --engine vllm --engine-python ~/vllm/bin/python
      lora-merge verify elsewhere --base Llama-3-8B --adapter my-lora --level full
    """
    from lora_merge import pipeline
    from lora_merge.cli.console import Console
    from lora_merge.core.request import VerifyRequest, parse_fields

    if quiet and verbose:
        raise click.UsageError("--quiet and --verbose exclude each other")
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    request = VerifyRequest(**parse_fields(given))
    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    with console.watching() as observer:
        proof = pipeline.prove(request, observer=observer)
    failed = not proof.ok or (strict and any(issue.severity == "warning" for issue in proof.issues))
    console.proof(proof, failed=failed)
    if failed:
        click.get_current_context().exit(exits.VERIFY)
