"""Parts of an output: which files one of several processes makes, the same in each of them, and they exchange no message."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.errors import RequestError
from lora_merge.requests.values import parse_part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lora_merge.merging.worker import FilePiece

_SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
_KUBERNETES = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True, slots=True)
class Part:
    """One of several processes that make an output together."""

    number: int
    """From 1."""

    of: int

    def __str__(self) -> str:
        """Return it in words."""
        return f"part {self.number} of {self.of}"

    def share(self, pieces: Sequence[FilePiece]) -> list[FilePiece]:
        """Return the pieces of this part: each one, in order, goes to the part that has the fewest bytes.

        Args:
            pieces: all of an output, the largest first.
        """
        loads = [0] * self.of
        own = []
        for piece in pieces:
            n = loads.index(min(loads))
            # A piece of empty tensors counts too, or one part would get all of these.
            loads[n] += max(piece.nbytes, 1)
            if n == self.number - 1:
                own.append(piece)
        return own


def part_of(text: str, environ: Mapping[str, str] | None = None) -> Part:
    """Return the part that ``--part`` means in this process.

    Args:
        text: ``2/8``; ``auto`` in a job array of SLURM; ``auto/8`` in an indexed job of Kubernetes.
        environ: environment variables; default: those of this process.

    Example:
        >>> part_of("2/8")
        Part(number=2, of=8)
        >>> part_of("auto/8", {"JOB_COMPLETION_INDEX": "0"})
        Part(number=1, of=8)
        >>> array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}
        >>> part_of("auto", array)
        Part(number=3, of=8)

    Raises:
        RequestError: a variable is missing, or does not fit.
    """
    found = os.environ if environ is None else environ
    number, of = parse_part(text).split("/") if "/" in text else (text, "")
    if number != "auto":
        return Part(int(number), int(of))
    if of:
        # Kubernetes counts from 0.
        return _checked(_number(found, _KUBERNETES, "auto/N", "an indexed job of Kubernetes") + 1, int(of))
    task, first, count = (_number(found, name, "auto", "a job array of SLURM") for name in _SLURM)
    # An array may count in steps: --array=0-28:4.
    step = int(found.get("SLURM_ARRAY_TASK_STEP", "1"))
    return _checked((task - first) // max(step, 1) + 1, count)


def _number(environ: Mapping[str, str], name: str, form: str, where: str) -> int:
    """Return an environment variable as a number.

    Raises:
        RequestError: it is not set, or is not a number.
    """
    value = environ.get(name, "")
    if not value.isdecimal():
        sentence = f"is {form}, but {name} is {f'{value!r}' if value else 'not set'}"
        raise RequestError(
            "", 0, "part", sentence, hint=f"run it in {where}, or write --part 1/8, for example"
        )
    return int(value)


def _checked(number: int, of: int) -> Part:
    """Return a part whose number the environment has told.

    Raises:
        RequestError: there are fewer parts.
    """
    if not 1 <= number <= of:
        raise RequestError(
            "",
            0,
            "part",
            f"is number {number} of {of}",
            hint="give every process of the job one number, from 1",
        )
    return Part(number, of)
