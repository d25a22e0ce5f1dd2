"""What a run was asked to do, for its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.requests.option import Verb

if TYPE_CHECKING:
    from lora_merge.requests.request import InspectRequest, Request, VerifyRequest


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run was asked to do."""

    verb: Verb

    command: str = ""
    """The command line, without secrets; empty where it is not known."""

    base: str = ""
    adapters: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()
    """Directories of outputs: those of all jobs, for a batch."""


def subject_of(verb: Verb, request: Request | VerifyRequest | InspectRequest, command: str = "") -> Subject:
    """Return what a request asks for."""
    # An inspection has one adapter and no output.
    adapters = (request.adapter,) if isinstance(request.adapter, str) else request.adapter
    out: str = getattr(request, "out", "")
    return Subject(verb, command, request.base or "", adapters, (out,) if out else ())
