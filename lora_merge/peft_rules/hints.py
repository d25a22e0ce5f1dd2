"""Hints that readers and the plan give in several places: what to do about a file, a configuration or a base that does
not fit.
"""

from __future__ import annotations

INCOMPLETE = "save or download the adapter again: its file is incomplete"
OTHER_CONFIG = "use the adapter_config.json of the training: this one does not belong to these tensors"
OTHER_MODEL = "check --base: the adapter was trained on another model"
DROPPED = (
    "use the adapter_config.json of the training: this one does not match, and PEFT would drop these tensors "
    "without a message"
)
SERVE_UNMERGED = "serve the adapter with PEFT, unmerged"
NEWER = "update lora-merge: a newer release may support it"


def incomplete(otherwise: str) -> str:
    """Return the hint for an incomplete file, with what PEFT does with it: ``"would use zeros"``."""
    return f"{INCOMPLETE} (PEFT {otherwise})"
