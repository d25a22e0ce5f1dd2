"""Dtypes and methods in a few words, for an output whose plan is not at hand. The headline of a run is in `lora_merge.merging`."""

from __future__ import annotations

from collections.abc import Iterable

from lora_merge.core.tensor import TORCH_TYPES
from lora_merge.merging.headline import DTYPE_WORDS
from lora_merge.peft_rules.method_names import method_name, ranks_text

_WORDS = {**DTYPE_WORDS, **{TORCH_TYPES[code]: word for code, word in DTYPE_WORDS.items()}}
"""The same by the names of torch too, which configurations have."""


def dtype(name: str) -> str:
    """Return the short name of a dtype.

    Example:
        >>> dtype("BF16"), dtype("float32"), dtype("FP8, blocks of 128 x 128")
        ('bf16', 'fp32', 'FP8, blocks of 128 x 128')
    """
    return _WORDS.get(name, name)


def methods_text(kinds: Iterable[str], ranks: Iterable[str]) -> str:
    """Return methods with their ranks.

    Example:
        >>> methods_text(["low_rank"], ["16"]), methods_text(["dora", "whole"], ["8", "32"])
        ('LoRA r16', 'DoRA r8-32 + whole tensor')
    """
    names = list(dict.fromkeys(map(method_name, kinds)))
    if names:
        names[0] += ranks_text(int(rank) for rank in ranks if int(rank))
    return " + ".join(names)
