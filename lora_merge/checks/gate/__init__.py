"""The gate: what an engine must find in a directory to load all of it, as vLLM, LMDeploy and transformers read it.

Engines forgive too much: vLLM and LMDeploy load a checkpoint with tensors missing, and say nothing. A rule looks at
a directory as it is, does not know the plan, and yields what an engine would refuse, misread or pass over. `RULES` is the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lora_merge.checks.gate.code import code
from lora_merge.checks.gate.complete import complete
from lora_merge.checks.gate.config import config
from lora_merge.checks.gate.embeddings import embeddings
from lora_merge.checks.gate.linear import linear
from lora_merge.checks.gate.quantised import quantised
from lora_merge.checks.gate.scales import scales
from lora_merge.checks.gate.tokenizer import tokenizer
from lora_merge.checks.gate.weights import weights
from lora_merge.core.report import Issue
from lora_merge.formats.written_checkpoint import Output

Rule = Callable[[Output], Iterator[Issue]]

RULES: dict[str, Rule] = {
    "weights": weights,
    "config": config,
    "quantised": quantised,
    "scales": scales,
    "embeddings": embeddings,
    "code": code,
    "tokenizer": tokenizer,
    "complete": complete,
    "linear": linear,
}

SLOW = frozenset({"complete", "linear"})
"""Rules that import transformers, which takes seconds."""

__all__ = ["RULES", "SLOW", "Rule"]
