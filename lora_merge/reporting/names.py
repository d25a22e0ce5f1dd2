"""Methods, storages and architectures as the field writes them: ``low_rank`` is "LoRA", ``LlamaForCausalLM`` is "Llama"."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

METHODS: Mapping[str, str] = {
    "low_rank": "LoRA",
    "stacked": "LoRA on fused experts",
    "dora": "DoRA",
    "addition": "added weights",
    "rows": "trained tokens",
    "peft_layer": "PEFT layer",
    "whole": "full weights",
    "LORA": "LoRA",
    "DORA": "DoRA",
    "ADALORA": "AdaLoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "VERA": "VeRA",
    "RANDLORA": "RandLoRA",
    "FOURIERFT": "FourierFT",
    "XLORA": "X-LoRA",
    "VBLORA": "VB-LoRA",
    "WAVEFT": "WaveFT",
    "DELORA": "DeLoRA",
    "GRALORA": "GraLoRA",
    "SHIRA": "SHiRA",
    "ROAD": "RoAd",
    "MISS": "MiSS",
    "BONE": "Bone",
    "ADAMSS": "AdaMSS",
    "PSOFT": "PSOFT",
    "TINYLORA": "TinyLoRA",
    "GLORA": "GLoRA",
    "LN_TUNING": "LayerNorm tuning",
}
"""Algebra or PEFT type → name. A name that is missing is shown as it is."""

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

_CLASS = re.compile(r"(?:For[A-Z]\w*|LMHeadModel|Model)$")


def method(name: str) -> str:
    """Return the name of a method.

    Example:
        >>> method("low_rank"), method("LOKR"), method("new")
        ('LoRA', 'LoKr', 'new')
    """
    return METHODS.get(name, name)


def dtype(name: str) -> str:
    """Return the short name of a dtype.

    Example:
        >>> dtype("BF16"), dtype("float32"), dtype("I8")
        ('bf16', 'fp32', 'i8')
    """
    return _DTYPES.get(name, name.lower())


def architecture(class_name: str) -> str:
    """Return the family of a model's class.

    Example:
        >>> architecture("LlamaForCausalLM"), architecture("GPT2LMHeadModel"), architecture("")
        ('Llama', 'GPT2', '')
    """
    return _CLASS.sub("", class_name)


def parameters(n: int) -> str:
    """Return a number of parameters as models are named; empty for 0.

    Example:
        >>> parameters(8_030_261_248), parameters(1_240_000_000), parameters(717_376), parameters(0)
        ('8B', '1.2B', '717K', '')
    """
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= size:
            return f"{n / size:.2g}{unit}" if n < 10 * size else f"{n / size:.0f}{unit}"
    return str(n or "")


def methods_text(kinds: Iterable[str], ranks: Iterable[str]) -> str:
    """Return methods with their ranks: the beginning of a headline.

    Example:
        >>> methods_text(["low_rank"], ["16"]), methods_text(["dora", "whole"], ["8", "32"])
        ('LoRA r16', 'DoRA r8–32 + full weights')
    """
    names = list(dict.fromkeys(map(method, kinds)))
    numbers = sorted({int(rank) for rank in ranks if int(rank)})
    if names and numbers:
        names[0] += f" r{numbers[0]}" + (f"–{numbers[-1]}" if len(numbers) > 1 else "")
    return " + ".join(names)
