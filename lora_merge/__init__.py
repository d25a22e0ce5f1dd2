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
    from lora_merge.core.inspection import Inspection
    from lora_merge.core.lora import ConvertReport
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue, Observer, Proof, Report, Summary, Verdict
    from lora_merge.errors import (
        CheckpointError,
        ConvertError,
        LoraMergeError,
        PlanError,
        RequestError,
        ResolveError,
        UnknownFormatError,
        UnsupportedError,
        VerifyError,
        WriteError,
    )
    from lora_merge.pipeline import convert, extract, inspect, merge, plan, verify
    from lora_merge.requests.keywords import (
        ConvertOptions,
        ExtractOptions,
        InspectOptions,
        MergeOptions,
        PlanOptions,
        VerifyOptions,
    )
    from lora_merge.requests.request import (
        ConvertRequest,
        ExtractRequest,
        InspectRequest,
        Request,
        VerifyRequest,
    )

__all__ = [
    "CheckpointError",
    "ConvertError",
    "ConvertOptions",
    "ConvertReport",
    "ConvertRequest",
    "ExtractOptions",
    "ExtractRequest",
    "InspectOptions",
    "InspectRequest",
    "Inspection",
    "Issue",
    "LoraMergeError",
    "MergeOptions",
    "MergePlan",
    "Observer",
    "PlanError",
    "PlanOptions",
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
    "VerifyOptions",
    "VerifyRequest",
    "WriteError",
    "__version__",
    "convert",
    "extract",
    "inspect",
    "merge",
    "plan",
    "verify",
]

_HOMES = (
    "lora_merge.errors",
    "lora_merge.core.report",
    "lora_merge.requests.request",
    "lora_merge.requests.keywords",
    "lora_merge.core.plan",
    "lora_merge.core.lora",
    "lora_merge.core.inspection",
)
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
    def convert(self) -> Any:
        """Return the function; importing the package of this name does not change that."""
        return import_module("lora_merge.pipeline").convert

    @convert.setter
    def convert(self, module: ModuleType) -> None: ...

    @property
    def extract(self) -> Any:
        """Return the function; importing the module of this name does not change that."""
        return import_module("lora_merge.pipeline").extract

    @extract.setter
    def extract(self, module: ModuleType) -> None: ...

    @property
    def inspect(self) -> Any:
        """Return the function; importing the module of this name does not change that."""
        return import_module("lora_merge.pipeline").inspect

    @inspect.setter
    def inspect(self, module: ModuleType) -> None: ...

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
