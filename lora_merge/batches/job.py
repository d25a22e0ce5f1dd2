"""One job of a batch: a request with a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_merge.requests.request import ConvertRequest, Request


@dataclass(frozen=True, slots=True)
class Job:
    """One merge or one conversion."""

    name: str
    """Its name in reports; by default the path of its output."""

    request: Request | ConvertRequest
    line: int = 0
    """Line in the batch file, from 1; 0 if it is from no file."""

    @property
    def kind(self) -> Literal["merge", "convert"]:
        """The kind of its request."""
        return "merge" if isinstance(self.request, Request) else "convert"
