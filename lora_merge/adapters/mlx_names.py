"""What mlx-lm calls the modules of each model family, and what Hugging Face calls them.

mlx-lm has its own model classes; their ``sanitize`` turns a published checkpoint into their parameters. Most families keep
the published names. Models with a vision tower, GPT-NeoX, GPT-2 and most mixtures of experts do not.

Reference:
    ``mlx_lm/models/*.py`` and ``mlx_lm.utils.MODEL_REMAPPING`` (mlx-lm 0.32.2). Families marked *loaded* below were
    loaded there from tiny checkpoints of transformers 5, and each parameter was compared; the others were read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge.modeling.towers import TOWER

Renames = tuple[tuple[str, str], ...]
"""Patterns at the start of a module's path and what replaces them; the first that matches counts."""

_GATED = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names of an expert's projections, and mlx-lm's."""

_EXPERT = re.compile(r"(?P<block>.+)\.experts\.(?P<index>\d+)\.(?P<projection>[^.]+)")


@dataclass(frozen=True, slots=True)
class MlxFamily:
    """The names of one family in mlx-lm."""

    to_mlx: Renames = ()
    """From a path of Hugging Face, of any release of transformers, to mlx-lm's."""

    to_hf: Renames = ()
    """From mlx-lm's path to that of transformers 5."""

    stack: str = "switch_mlp"
    """What mlx-lm calls the stack of a layer's experts."""

    projections: Mapping[str, str] = field(default_factory=dict)
    """Hugging Face's name of an expert's projection → mlx-lm's, where they differ."""

    everywhere: bool = False
    """True where `projections` holds outside of experts too."""

    lacking: Mapping[str, str] = field(default_factory=dict)
    """Ends of paths that have no LoRA in mlx-lm → why."""


class MlxNameError(ValueError):
    """A module has no name in mlx-lm; says why."""


_UNDER_LANGUAGE_MODEL: Renames = (
    (r"(model\.)?language_model\.(model\.)?lm_head$", "language_model.lm_head"),
    (r"lm_head$", "language_model.lm_head"),
    (r"(model\.language_model|language_model\.model|model)\.", "language_model.model."),
)
_FROM_LANGUAGE_MODEL: Renames = (
    (r"language_model\.lm_head$", "lm_head"),
    (r"language_model\.model\.", "model.language_model."),
)
_HEAD_IS_TIED = "mlx-lm always ties the head of this family to its embedding"
_NO_ROUTER = "mlx-lm's router of this family is not a linear layer"
_ABSORBED = "mlx-lm splits kv_b_proj into one matrix per head"
_TIED = {"lm_head": _HEAD_IS_TIED}
_LATENT = {"kv_b_proj": _ABSORBED, "mlp.gate": _NO_ROUTER}

_SAME = MlxFamily()
_SAME_TIED = MlxFamily(lacking=_TIED)
_ROUTED = MlxFamily(lacking={"mlp.gate": _NO_ROUTER})
_MIXTRAL = MlxFamily(projections=_GATED)
_VISION = MlxFamily(_UNDER_LANGUAGE_MODEL, _FROM_LANGUAGE_MODEL)
_DEEPSEEK = MlxFamily(lacking=_LATENT)

_FAMILIES: tuple[tuple[MlxFamily, str], ...] = (
    # loaded
    (
        _SAME,
        (
            "apertus ernie4_5 ernie4_5_moe falcon_mamba gemma3_text gemma4_text glm glm4 gpt_bigcode granite helium "
            "hunyuan_v1_dense internlm3 jamba llama mamba2 mellum ministral3 mistral nemotron olmo2 olmoe phi phi3 qwen2 "
            "qwen2_moe qwen3 qwen3_moe qwen3_next recurrent_gemma seed_oss smollm3 stablelm starcoder2"
        ),
    ),
    (_SAME_TIED, "cohere cohere2 gemma gemma2 lfm2 mamba"),
    (MlxFamily(lacking=_TIED, projections=_GATED, everywhere=True), "lfm2_moe"),
    (_MIXTRAL, "minimax_m2 mixtral phimoe"),
    (_DEEPSEEK, "deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa"),
    (_ROUTED, "exaone_moe glm4_moe"),
    (MlxFamily(stack="experts", lacking={"mlp.gate": _NO_ROUTER}), "dots1"),
    (
        MlxFamily(projections={"up_proj": "fc1", "down_proj": "fc2"}, lacking={"mixer.gate": _NO_ROUTER}),
        "nemotron_h",
    ),
    (
        MlxFamily(to_mlx=((r"(.*\.mlp\.gate)$", r"\1.proj"),), to_hf=((r"(.*\.mlp\.gate)\.proj$", r"\1"),)),
        "laguna",
    ),
    (_VISION, "gemma3 llava mistral3 qwen2_vl qwen2_5_vl qwen3_5 qwen3_vl"),
    (
        MlxFamily(
            lacking={
                "input_linear": "mlx-lm splits input_linear into gate_proj and up_proj",
                "output_linear": "mlx-lm stores output_linear as the experts' down_proj",
            }
        ),
        "granitemoe",
    ),
    (
        MlxFamily(
            to_mlx=(
                (r"(embed_out|lm_head)$", "model.embed_out"),
                (r"gpt_neox\.layers\.", "model.h."),
                (r"gpt_neox\.", "model."),
            ),
            to_hf=(
                (r"model\.embed_out$", "lm_head"),
                (r"model\.h\.", "gpt_neox.layers."),
                (r"model\.", "gpt_neox."),
            ),
        ),
        "gpt_neox",
    ),
    # read
    (_SAME, "exaone exaone4 internlm2 iquestcoder mimo minicpm minicpm3 olmo3 xverse"),
    (_VISION, "gemma4 gemma4_unified qwen3_5_moe qwen3_vl_moe"),
    (_DEEPSEEK, "kimi_k2"),
    (
        MlxFamily(
            to_mlx=((r"(transformer\.)?(?=h\.|wte$|wpe$)", "model."),),
            to_hf=((r"model\.", "transformer."),),
            lacking=_TIED,
        ),
        "gpt2",
    ),
    (MlxFamily(to_mlx=((r"transformer\.", "model."),), to_hf=((r"model\.", "transformer."),)), "gptj"),
)

FAMILIES: Mapping[str, MlxFamily] = {
    model_type: family for family, names in _FAMILIES for model_type in names.split()
}
"""By ``model_type``. mlx-lm may have other families under other names, or not at all.

Left out because a weight of theirs is another one in mlx-lm: Falcon-H1 (its multipliers are folded into the weights),
Granite 4 (``shared_mlp.input_linear`` is split), gpt-oss and Llama 4 (their experts are stacked and interleaved),
OLMo 1 (its class has the names of AI2's own code).
"""


def family_of(config: Mapping[str, Any]) -> MlxFamily | None:
    """Return the names of a base's family by its ``model_type``; None where they are not known."""
    return FAMILIES.get(str(config.get("model_type")))


def mlx_name(module: str, family: MlxFamily) -> str:
    """Return what mlx-lm calls a module; of an expert, the stack that it is a part of.

    Raises:
        MlxNameError: it has none there.

    Example:
        >>> mlx_name("model.layers.0.block_sparse_moe.experts.7.w3", FAMILIES["mixtral"])
        'model.layers.0.block_sparse_moe.switch_mlp.up_proj'
        >>> mlx_name("gpt_neox.layers.1.attention.dense", FAMILIES["gpt_neox"])
        'model.h.1.attention.dense'
    """
    if TOWER.search(module):
        raise MlxNameError(
            "belongs to a part of the model that mlx-lm does not load: it loads only the language model"
        )
    for end, why in family.lacking.items():
        if module == end or module.endswith(f".{end}"):
            raise MlxNameError(f"cannot have a LoRA in mlx-lm: {why}")
    path = _renamed(module, family.to_mlx)
    match = _EXPERT.fullmatch(path)
    if match is not None:
        projection = match["projection"]
        return f"{match['block']}.{family.stack}.{family.projections.get(projection, projection)}"
    stem, dot, last = path.rpartition(".")
    # LFM2-MoE has these names in dense layers too.
    return f"{stem}{dot}{family.projections.get(last, last)}" if family.everywhere else path


def hf_name(module: str, family: MlxFamily) -> str:
    """Return what transformers 5 calls a module of mlx-lm. An expert has a number, as the reader of mlx-lm gives it
    one.

    Example:
        >>> hf_name("language_model.model.layers.0.self_attn.q_proj", FAMILIES["qwen3_vl"])
        'model.language_model.layers.0.self_attn.q_proj'
        >>> hf_name("model.layers.0.block_sparse_moe.experts.7.up_proj", FAMILIES["mixtral"])
        'model.layers.0.block_sparse_moe.experts.7.w3'
    """
    path = _renamed(module, family.to_hf)
    stem, dot, last = path.rpartition(".")
    if not (family.everywhere or _EXPERT.fullmatch(path)):
        return path
    # The table is one to one within a family, so it can be read backwards.
    back = {mlx: hf for hf, mlx in family.projections.items()}
    return f"{stem}{dot}{back.get(last, last)}"


def is_expert(module: str) -> bool:
    """Return True for a module of one expert: ``….experts.3.up_proj``."""
    return _EXPERT.fullmatch(module) is not None


def _renamed(path: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        found, count = re.subn(f"^{pattern}", replacement, path)
        if count:
            return found
    return path
