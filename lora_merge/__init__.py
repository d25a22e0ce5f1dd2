"""Merge adapters into Hugging Face checkpoints.

>>> import lora_merge
>>> report = lora_merge.merge(base="base", adapter="adapter", out="merged")  # doctest: +SKIP
>>> report.summary.n_merged  # doctest: +SKIP
196
"""

from __future__ import annotations

from lora_merge._version import __version__

# `typing` and `importlib` take time, in which an interrupt of the command would end with a traceback of Python.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lora_merge.api import convert, diagnose, extract, inspect, merge, plan, verify
    from lora_merge.conversion.lora import ConvertReport
    from lora_merge.core.plan import MergePlan
    from lora_merge.core.report import Issue, Observer, Proof, Report, Summary, Verdict
    from lora_merge.diagnosis.facts import Diagnosis
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
    from lora_merge.inspection.facts import Inspection
    from lora_merge.reporting import report_html, write_report
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
    "Diagnosis",
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
    "diagnose",
    "extract",
    "inspect",
    "merge",
    "plan",
    "report_html",
    "verify",
    "write_report",
]

_HOMES = (
    "lora_merge.errors",
    "lora_merge.core.report",
    "lora_merge.requests.request",
    "lora_merge.requests.keywords",
    "lora_merge.core.plan",
    "lora_merge.conversion.lora",
    "lora_merge.inspection.facts",
    "lora_merge.diagnosis.facts",
    "lora_merge.reporting",
)
"""Modules that define the other public names. They are imported when one of their names is first used."""

_VERBS = frozenset({"convert", "diagnose", "extract", "inspect", "merge", "plan", "verify"})
"""Functions of `lora_merge.api`, imported on first use: ``lora-merge --help`` needs none."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that ``lora-merge --help`` answers at once.

    Raises:
        AttributeError: it is not one of `__all__`.
    """
    from importlib import import_module

    if name in _VERBS:
        return getattr(import_module("lora_merge.api"), name)
    if name in __all__:
        for home in map(import_module, _HOMES):
            if hasattr(home, name):
                return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
