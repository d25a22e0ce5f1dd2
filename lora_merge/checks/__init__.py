"""Checks: questions about an output, each answered by code that shares as little as possible with the merge.

A check looks at the staged files and yields what is wrong. `CHECKS` is the table, in the order asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_merge.checks.evidence import Evidence
from lora_merge.checks.finite import finite
from lora_merge.checks.layers import layers
from lora_merge.checks.loadable import loadable
from lora_merge.checks.recompute import recompute
from lora_merge.checks.structure import structure
from lora_merge.checks.untouched import untouched
from lora_merge.core.report import Issue

Check = Callable[[Evidence], Iterator[Issue]]

CHECKS: dict[str, Check] = {
    "structure": structure,
    "loadable": loadable,
    "finite": finite,
    "untouched": untouched,
    "recompute": recompute,
    "layers": layers,
}

__all__ = ["CHECKS", "Check", "Evidence"]
