"""Merge adapters into Hugging Face checkpoints.

>>> import lora_merge
>>> report = lora_merge.merge(base="base", adapter="adapter", out="merged")  # doctest: +SKIP
>>> report.summary.n_merged  # doctest: +SKIP
196
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lora_merge._version import __version__

if TYPE_CHECKING:
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue, Observer, Proof, Report, Summary, Verdict
    from lora_merge.core.request import Request, VerifyRequest
    from lora_merge.errors import (
        CheckpointError,
        LoraMergeError,
        PlanError,
        RequestError,
        ResolveError,
        UnknownFormatError,
        UnsupportedError,
        VerifyError,
        WriteError,
    )
    from lora_merge.pipeline import merge, plan, verify

__all__ = [
    "CheckpointError",
    "Issue",
    "LoraMergeError",
    "MergePlan",
    "Observer",
    "PlanError",
    "Proof",
    "Report",
    "Request",
    "RequestError",
    "ResolveError",
    "Summary",
    "UnknownFormatError",
    "UnsupportedError",
    "Verdict",
    "VerifyError",
    "VerifyRequest",
    "WriteError",
    "__version__",
    "merge",
    "plan",
    "verify",
]

_HOMES = ("lora_merge.errors", "lora_merge.core.report", "lora_merge.core.request", "lora_merge.core.plan")
"""Where the public types live."""


def __getattr__(name: str) -> Any:
    """Return a public type, whose module is imported only now: ``lora-merge --help`` answers at once."""
    if name in __all__:
        for home in map(import_module, _HOMES):
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """The package, whose verbs are functions though they are names of modules as well."""

    @property
    def merge(self) -> Any:
        """Return the function; importing the module of this name does not change that."""
        return import_module("lora_merge.pipeline").merge

    @merge.setter
    def merge(self, module: ModuleType) -> None: ...

    @property
    def plan(self) -> Any:
        """Return the function; importing the package of this name does not change that."""
        return import_module("lora_merge.pipeline").plan

    @plan.setter
    def plan(self, module: ModuleType) -> None: ...

    @property
    def verify(self) -> Any:
        """Return the function; importing the module of this name does not change that."""
        return import_module("lora_merge.pipeline").verify

    @verify.setter
    def verify(self, module: ModuleType) -> None: ...


sys.modules[__name__].__class__ = _Package
