"""One job of a batch: a request, and its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_merge.requests.request import ConvertRequest, Request


@dataclass(frozen=True, slots=True)
class Job:
    """One merge or one conversion."""

    name: str
    """Of its own; by default its output's path."""

    request: Request | ConvertRequest
    line: int = 0
    """Where it stands in the batch file; 0 where it stands in none."""

    @property
    def kind(self) -> Literal["merge", "convert"]:
        """Return what it is."""
        return "merge" if isinstance(self.request, Request) else "convert"
