"""The command as a separate process: its streams, its limits, and how it ends."""

from __future__ import annotations

import gc
import os
from typing import NoReturn

from lora_merge.cli import end_interrupted, exits
from lora_merge.cli.app import main
from lora_merge.cli.issues import say_bug
from lora_merge.cli.program import AS_EXTENSION, call_it, called, own_process
from lora_merge.runtime.shortage import mind_limits
from lora_merge.runtime.streams import finish, guard
from lora_merge.runtime.temporary import remove_folders


def run(*, as_extension: bool) -> NoReturn:
    """Run the command, and end the process.

    Args:
        as_extension: whether ``hf`` runs it.
    """
    # First of all: before any file is opened that could get the number of a standard stream.
    guard()
    # The process is about to end, and collecting garbage while torch loads takes a fifth of a second.
    gc.disable()
    if as_extension:
        call_it(AS_EXTENSION)
    own_process()
    mind_limits()
    code = 0
    try:
        main(prog_name=called())
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except KeyboardInterrupt:
        end_interrupted()
    except BaseException as exc:  # noqa: BLE001 - the process ends here, whatever it is
        code = exits.BUG
        say_bug(exc)
    finish()
    remove_folders()
    # Without taking the interpreter down, which costs half a second after torch was loaded.
    os._exit(code)
