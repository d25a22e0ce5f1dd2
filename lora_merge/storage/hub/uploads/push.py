"""Which repo of the Hub an output goes to, and how: what the user asked for, as a value."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from lora_merge.errors import RequestError
from lora_merge.storage.source import parse_source

UploadWay = Literal["spool", "stream"]

SCHEME = "hf"
"""Of the texts of outputs on the Hub."""


_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Push:
    """A push to one branch of one repo."""

    repo: str
    """``org/name``."""

    branch: str = ""
    """Empty for the repo's own (``main``)."""

    is_private: bool | None = None
    """Of a repo that is to be created; None: private. Of one that exists: what it is expected to be."""

    is_left_open: bool = False
    """Leave the pull request open, for somebody to merge."""

    message: str = ""
    """Of the commit; empty: a default."""

    way: UploadWay = "spool"
    """``spool``: a weight file is written to this disk and then uploaded. ``stream``: it is uploaded while it is made."""

    spool_bytes: int = 0
    """Bytes of weight files that the spool holds at most, as far as it is known; 0: unknown."""

    token: str | None = field(default=None, repr=False)
    """None leaves it to ``HF_TOKEN`` and the login."""

    def __str__(self) -> str:
        """Return the text that names the repo and its branch."""
        return f"{SCHEME}://{self.repo}" + (f"@{self.branch}" if self.branch else "")


def is_on_hub(out: str) -> bool:
    """Return True for the text of an output on the Hub."""
    return out.startswith(f"{SCHEME}://")


def parse_target(text: str, option: str) -> tuple[str, str]:
    """Return the repo and the branch that a text names.

    Args:
        text: ``org/name``, ``org/name@BRANCH``, or the same after ``hf://``.
        option: the field of the request that has it, for messages.

    Raises:
        RequestError: it names neither.

    Example:
        >>> parse_target("org/name", "push_to_hub"), parse_target("hf://org/name@dev", "out")
        (('org/name', ''), ('org/name', 'dev'))
    """
    source = parse_source(text)
    hint = "write ORG/NAME, or ORG/NAME@BRANCH"
    if source is not None and source.host == "ms":
        sentence = f"is {text}, and outputs are pushed to the Hugging Face Hub only"
        raise RequestError(
            "", 0, option, sentence, hint=f"{hint}; modelscope upload sends a directory to ModelScope"
        )
    if source is None or "/" not in source.repo or source.repo.endswith(".git"):
        raise RequestError("", 0, option, f"is {text}, which is not a repo of the Hub", hint=hint)
    if source.folder:
        sentence = f"is {text}, but an output is a whole repo, not a folder in one"
        raise RequestError("", 0, option, sentence, hint=hint)
    revision = source.revision or ""
    if revision.startswith("refs/") or _COMMIT.fullmatch(revision):
        sentence = f"is {text}, and {revision} is not a branch"
        raise RequestError("", 0, option, sentence, hint="name a branch; --create-pr opens a pull request")
    return source.repo, revision
