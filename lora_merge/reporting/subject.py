"""What a run was asked to do, for its page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Subject:
    """What a run was asked to do."""

    verb: str
    """``"merge"``, ``"verify"``, …"""

    command: str = ""
    """The command line, without secrets; empty where it is not known."""

    base: str = ""
    adapters: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()
    """Directories of outputs: those of all jobs, for a batch."""
