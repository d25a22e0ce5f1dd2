"""The command as a program: since when it runs, and the name by which it was called, which is ``lora-merge``, or ``hf lora-merge``
as an extension of the Hub's command.
"""

from __future__ import annotations

from typing import Final

from lora_merge.runtime.age import age

OWN: Final = "lora-merge"

AS_EXTENSION: Final = "hf lora-merge"
"""``hf`` runs the console script ``hf-lora-merge`` for it."""

_called = [OWN]
_is_process = [False]


def call_it(name: str) -> None:
    """Use another name in usage lines, examples and hints from now on."""
    _called[0] = name


def called() -> str:
    """Return the name to show."""
    return _called[0]


def own_process() -> None:
    """Say that this process runs the command and nothing else."""
    _is_process[0] = True


def seconds_until_now() -> float | None:
    """Return the wall seconds since the command's process began; None where it runs within another program."""
    return age() if _is_process[0] else None


def with_name(example: str) -> str:
    """Return an example of the help with the name by which the command was called."""
    indent = len(example) - len(example.lstrip())
    is_own = example[indent:].startswith(f"{OWN} ")
    return f"{example[:indent]}{called()}{example[indent + len(OWN) :]}" if is_own else example
