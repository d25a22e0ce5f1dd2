"""Merge adapters into Hugging Face checkpoints.

>>> import lora_merge
>>> report = lora_merge.merge(base="base", adapter="adapter", out="merged")  # doctest: +SKIP
>>> report.summary.n_merged  # doctest: +SKIP
196
"""

from lora_merge._version import __version__
from lora_merge.core.plan import MergePlan
from lora_merge.core.report import Issue, Observer, Report, Summary, Verdict
from lora_merge.core.request import Request
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

# These two are also names of modules; importing the functions last makes them what the package shows.
from lora_merge.pipeline import merge, plan

__all__ = [
    "CheckpointError",
    "Issue",
    "LoraMergeError",
    "MergePlan",
    "Observer",
    "PlanError",
    "Report",
    "Request",
    "RequestError",
    "ResolveError",
    "Summary",
    "UnknownFormatError",
    "UnsupportedError",
    "Verdict",
    "VerifyError",
    "WriteError",
    "__version__",
    "merge",
    "plan",
]
