"""``lora-merge verify``: checks an output against its manifest, and recomputes it from base and adapter."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli import exits
from lora_merge.cli.options import SETTINGS, console_of, options


@click.command(context_settings=SETTINGS)
@options("verify")
def verify(*, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
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
    from lora_merge import api
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import VerifyRequest

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(VerifyRequest, flags)
    with console.watching() as observer:
        proof = api.prove(request, observer=observer)
    is_strict_about = request.strict and any(issue.severity == "warning" for issue in proof.issues)
    failed = not proof.ok or is_strict_about
    console.proof(proof, failed=failed)
    if failed:
        click.get_current_context().exit(exits.VERIFY)
