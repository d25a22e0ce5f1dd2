"""Dtypes and methods in a few words, for an output whose plan is not at hand. The headline of a run is in `lora_merge.merging`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lora_merge.peft_rules.method_names import method_name

_DTYPES: Mapping[str, str] = {
    "BF16": "bf16",
    "F16": "fp16",
    "F32": "fp32",
    "F64": "fp64",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
}


def dtype(name: str) -> str:
    """Return the short name of a dtype.

    Example:
        >>> dtype("BF16"), dtype("float32"), dtype("FP8, blocks of 128 x 128")
        ('bf16', 'fp32', 'FP8, blocks of 128 x 128')
    """
    return _DTYPES.get(name, name)


def methods_text(kinds: Iterable[str], ranks: Iterable[str]) -> str:
    """Return methods with their ranks.

    Example:
        >>> methods_text(["low_rank"], ["16"]), methods_text(["dora", "whole"], ["8", "32"])
        ('LoRA r16', 'DoRA r8-32 + whole tensor')
    """
    names = list(dict.fromkeys(map(method_name, kinds)))
    numbers = sorted({int(rank) for rank in ranks if int(rank)})
    if names and numbers:
        names[0] += f" r{numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")
    return " + ".join(names)
