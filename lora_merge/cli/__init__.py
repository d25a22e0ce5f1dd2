"""The command line: one file per command; options, exit codes and the console are shared."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

# Before the other imports, which an older Python cannot even parse. pip refuses it too, but a clone needs no pip.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "error: lora-merge needs Python 3.11 or newer, and this is Python {}.{} ({})\n"
        "hint: python3.11 -m lora_merge, or: uv tool install --python 3.11 .".format(
            *sys.version_info[:2], sys.executable
        )
    )

from lora_merge.cli import exits
from lora_merge.cli.app import main
from lora_merge.cli.issues import say_bug
from lora_merge.cli.program import AS_EXTENSION, call_it, called, own_process
from lora_merge.runtime.shortage import mind_limits
from lora_merge.runtime.streams import finish, guard
from lora_merge.runtime.temporary import remove_folders

__all__ = ["entry", "hf_entry", "main"]


def hf_entry() -> NoReturn:
    """Run the command as ``hf lora-merge``: ``hf`` calls the console script ``hf-lora-merge``."""
    call_it(AS_EXTENSION)
    entry()


def entry() -> NoReturn:
    """Run the command as a separate process. Ends the process at once when the command is done."""
    # First of all: before any file is opened that could get the number of a standard stream.
    guard()
    # The process is about to end, and collecting garbage while torch loads takes a fifth of a second.
    gc.disable()
    own_process()
    mind_limits()
    code = 0
    try:
        main(prog_name=called())
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException as exc:  # noqa: BLE001 - the process ends here, whatever it is
        code = exits.BUG
        say_bug(exc)
    finish()
    remove_folders()
    # Without taking the interpreter down, which costs half a second after torch was loaded.
    os._exit(code)
