"""The command line: one file per command; options, exit codes and the console are shared."""

from __future__ import annotations

import os
import sys

# Before the other imports, which an older Python cannot even parse. pip refuses it too, but a clone needs no pip.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "error: lora-merge needs Python 3.11 or newer, and this is Python {}.{} ({})\n"
        "hint: python3.11 -m lora_merge, or: uv tool install --python 3.11 .".format(
            *sys.version_info[:2], sys.executable
        )
    )

# All other imports are in functions: until they are done an interrupt would end with a traceback of Python.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from lora_merge.cli.app import main

__all__ = ["entry", "hf_entry", "main"]

INTERRUPTED = 130
"""The exit code of an interrupted command."""

_SHOWING = {"plan", "verify", "inspect", "doctor", "completion"}
OF_THE_GROUP = {"--help", "-h", "--help-all", "--version"}
_SHOWN_BY = {"--dry-run", *OF_THE_GROUP}
"""Commands and options whose only result is what they print."""

AGAIN = "run the same command again to start over"
"""The hint after an interrupt."""


def __getattr__(name: str) -> Any:
    """Import the command when it is first used.

    Raises:
        AttributeError: it is another name.
    """
    if name == "main":
        from lora_merge.cli.app import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def hf_entry() -> NoReturn:
    """Run the command as ``hf lora-merge``: ``hf`` calls the console script ``hf-lora-merge``."""
    _run(as_extension=True)


def entry() -> NoReturn:
    """Run the command as a separate process. Ends the process at once when the command is done."""
    _run()


def _run(*, as_extension: bool = False) -> NoReturn:
    try:
        import signal

        # Until the command has handlers of its own. A shell may have told a job to ignore the signal.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, end_interrupted)
        from lora_merge.cli.process import run

        run(as_extension=as_extension)
    except KeyboardInterrupt:
        end_interrupted()


def end_interrupted(*_: object) -> NoReturn:
    """End the process, where an interrupt came before or after the command itself. Imports nothing: an import may be going on."""
    try:
        os.write(2, f"error: {interrupted_words(sys.argv[1:])}\nhint: {AGAIN}\n".encode())
    finally:
        # Whether or not somebody can read it.
        os._exit(INTERRUPTED)


def interrupted_words(arguments: Sequence[str]) -> str:
    """Return the sentence for an interrupted command."""
    return "interrupted" if is_only_shown(arguments) else "interrupted; no output was created"


def is_only_shown(arguments: Sequence[str]) -> bool:
    """Return True where a command's only result is what it prints."""
    return bool(_SHOWING & set(arguments[:1]) or _SHOWN_BY & set(arguments))
