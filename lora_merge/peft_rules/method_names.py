"""The names of methods as their papers and users write them: ``"LORA"`` → ``"LoRA"``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

METHOD_NAMES: Mapping[str, str] = {
    "ADALORA": "AdaLoRA",
    "ADAMSS": "AdaMSS",
    "BEFT": "BEFT",
    "BOFT": "BOFT",
    "C3A": "C3A",
    "DEFT": "DEFT",
    "DELORA": "DeLoRA",
    "DORA": "DoRA",
    "FOURIERFT": "FourierFT",
    "FROD": "FRoD",
    "GLORA": "GLoRA",
    "GRALORA": "GraLoRA",
    "HIRA": "HiRA",
    "HRA": "HRA",
    "IA3": "IA³",
    "LN_TUNING": "LN tuning",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "LORA": "LoRA",
    "MISS": "MiSS",
    "OFT": "OFT",
    "OSF": "OSF",
    "PEANUT": "PEANuT",
    "PSOFT": "PSOFT",
    "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA",
    "ROAD": "RoAd",
    "RSLORA": "rsLoRA",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "SuperTuning",
    "TINYLORA": "TinyLoRA",
    "TRAINABLE_TOKENS": "trained tokens",
    "UNILORA": "Uni-LoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
    "WAVEFT": "WaveFT",
}
"""PEFT type → name. DoRA and rsLoRA are settings of a LoRA in PEFT, and names of methods to everyone else."""

ALGEBRA_NAMES: Mapping[str, str] = {
    "low_rank": "LoRA",
    "stacked": "LoRA on experts",
    "dora": "DoRA",
    "addition": "added values",
    "rows": "trained rows",
    "peft_layer": "PEFT layer",
    "whole": "whole tensor",
}
"""Algebra of `lora_merge.deltas` → its name on screens and in reports."""

COMBINATION_NAMES: Mapping[str, str] = {
    "linear": "linear",
    "ties": "TIES",
    "dare_linear": "DARE",
    "dare_ties": "DARE-TIES",
    "svd": "SVD",
}
"""Value of ``--combine`` → name."""


def method_name(kind: str) -> str:
    """Return the name of a PEFT type or an algebra; an unknown one as it is.

    Example:
        >>> method_name("LOHA"), method_name("low_rank"), method_name("NEW")
        ('LoHa', 'LoRA', 'NEW')
    """
    return METHOD_NAMES.get(kind) or ALGEBRA_NAMES.get(kind, kind)


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks as they follow a method's name; empty if there are none.

    Example:
        >>> f"LoRA{ranks_text([16, 16])}", f"DoRA{ranks_text([64, 8])}", f"LoKr{ranks_text([])}"
        ('LoRA r16', 'DoRA r8-64', 'LoKr')
    """
    found = sorted(set(ranks))
    if not found:
        return ""
    return f" r{found[0]}" if len(found) == 1 else f" r{found[0]}-{found[-1]}"
