"""``lora-merge verify``: checks an output against its manifest, and recomputes it from base and adapter."""

from __future__ import annotations

from typing import Any

import click

from lora_merge.cli import exits
from lora_merge.cli.help_pages import Verb
from lora_merge.cli.options import SETTINGS, console_of, options
from lora_merge.cli.reports import page_file
from lora_merge.cli.torch_ahead import load_for_verify


@click.command(cls=Verb, context_settings=SETTINGS)
@options("verify")
def verify(*, json: bool, quiet: bool, verbose: bool, **flags: Any) -> None:
    """Check a merged checkpoint against base and adapter.

    Checks that engines can load the checkpoint, that its bytes are those that its manifest recorded, and that its tensors
    equal a new merge of base and adapter, if both are available.

    The last lines list what was checked and what was not. Without a manifest and without base and adapter there
    is nothing to compare with, and verification fails. To check the structure only, use --level structure.

    \b
    Examples:
      lora-merge verify merged
      lora-merge verify merged --forward
      lora-merge verify merged --forward --engine vllm
      lora-merge verify elsewhere --base Llama-3-8B --adapter my-lora --level full
    """
    # Before the imports that follow, which take as long.
    load_for_verify(flags)
    from lora_merge import api
    from lora_merge.reporting.subject import subject_of
    from lora_merge.requests.parsing import parse_request
    from lora_merge.requests.request import VerifyRequest

    console = console_of(json=json, quiet=quiet, verbose=verbose)
    request = parse_request(VerifyRequest, flags)
    with page_file(request.report, subject_of("verify", request), quiet=quiet) as page:
        with console.watching() as observer:
            proof = api.prove(request, observer=observer)
        is_strict_about = request.strict and any(issue.severity == "warning" for issue in proof.issues)
        failed = not proof.ok or is_strict_about
        page.show(proof, failed=failed)
        console.proof(proof, request.out, failed=failed)
        if failed:
            click.get_current_context().exit(exits.VERIFY)
