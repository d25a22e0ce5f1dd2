"""Families of models whose LoRA llama.cpp can load: their architecture, and modules that its graphs leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lora_merge.core.report import error
from lora_merge.errors import ConvertError


@dataclass(frozen=True, slots=True)
class Family:
    """What llama.cpp makes of the models of one family."""

    arch: str
    """llama.cpp's name of the architecture."""

    permuted: bool = False
    """True if rows of q and k are reordered: the two rows of each rotation next to each other."""

    tied: bool = False
    """True if embeddings are tied by default, when ``config.json`` does not say."""

    refused: Mapping[str, str] = field(default_factory=dict)
    """Last part of a path → why LoRA on such a module is refused, as the end of a sentence."""


_IGNORED = "which llama.cpp loads and does not apply"

_DROPPED = "which llama.cpp's graph of this family does not have"

_LATENT = dict.fromkeys(
    ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "lm_head"), _IGNORED
)

_GEMMA3 = {"lm_head": _DROPPED, "embed_tokens": "whose rows llama.cpp cuts"}

FAMILIES: Mapping[str, Family] = {
    "llama": Family("llama", permuted=True),
    "mistral": Family("llama", permuted=True),
    "mixtral": Family("llama", permuted=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe"),
    "qwen3_moe": Family("qwen3moe"),
    "qwen2_vl": Family("qwen2vl"),
    "qwen2_vl_text": Family("qwen2vl"),
    "qwen2_5_vl": Family("qwen2vl"),
    "qwen2_5_vl_text": Family("qwen2vl"),
    "gemma": Family("gemma", tied=True, refused={"lm_head": _DROPPED}),
    "gemma2": Family("gemma2", tied=True, refused={"lm_head": _DROPPED}),
    "gemma3_text": Family("gemma3", tied=True, refused=_GEMMA3),
    "phi3": Family("phi3"),
    "gpt_oss": Family("gpt-oss"),
    "gpt2": Family("gpt2", tied=True, refused={"wpe": _IGNORED}),
    "gpt_neox": Family("gptneox"),
    "granite": Family("granite", permuted=True),
    "granitemoe": Family("granitemoe", permuted=True),
    "granitemoeshared": Family("granitemoe", permuted=True),
    "falcon_h1": Family("falcon-h1"),
    "internlm2": Family("internlm2", permuted=True),
    "deepseek_v2": Family("deepseek2", refused=_LATENT),
    "deepseek_v3": Family("deepseek2", refused=_LATENT),
    "glm4": Family("glm4"),
    "olmo2": Family("olmo2"),
    "starcoder2": Family("starcoder2", tied=True),
}
"""By the ``model_type`` of the text model (llama.cpp as llama-cpp-python 0.3.36 has it, ``conversion/*.py``)."""

AROUND: Mapping[tuple[str, str], str] = {
    ("gemma3", "gemma3_text"): "gemma3",
    ("llava", "llama"): "llama",
    ("mistral3", "mistral"): "mistral3",
    ("qwen2_vl", "qwen2_vl_text"): "qwen2vl",
    ("qwen2_5_vl", "qwen2_5_vl_text"): "qwen2vl",
}
"""``model_type`` of a model and of its text model → architecture. Other combinations are refused."""


def family_of(config: Mapping[str, Any], text: Mapping[str, Any]) -> Family:
    """Return what llama.cpp makes of a model.

    Args:
        config: the base's ``config.json``.
        text: its ``text_config``; empty for a model of text alone.

    Raises:
        ConvertError: the family, or the combination of model and text model, is not known.

    Reference:
        ``get_model_architecture`` (conversion/base.py) of llama.cpp.
    """
    around = str(config.get("model_type"))
    kind = str({**config, **text}.get("model_type"))
    family = FAMILIES.get(kind)
    own_class = str((text.get("architectures") or [""])[0])
    # A text model inside another model may have a separate architecture.
    if family is not None and around != kind and not own_class.endswith("ForCausalLM"):
        arch = AROUND.get((around, kind))
        family = replace(family, arch=arch) if arch else None
    if family is None:
        found = repr(kind) if around == kind else f"{kind!r} inside of {around!r}"
        sentence = f"is {found}, a family for which LoRA in llama.cpp is not supported here"
        known = ", ".join(sorted(FAMILIES))
        raise ConvertError(
            [
                error(
                    "unsupported",
                    "model_type",
                    sentence,
                    f"merge it, and convert the checkpoint; supported families: {known}",
                )
            ]
        )
    return family
