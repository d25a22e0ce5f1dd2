"""Model classes of SGLang 0.5.23, and which of their modules have LoRA.

SGLang has one LoRA for all classes. It finds modules whose sizes it knows by their names (``get_default_hidden_dim``),
in layers whose paths have ``layers.N.``. A class may narrow that (``should_apply_lora``) or extend it
(``get_hidden_dim``, ``supported_lora_modules``).

Reference:
    ``sglang/srt/models/*.py`` (``EntryClass`` and the linear layers of each file), ``sglang/srt/lora/utils.py``,
    ``lora.py``. Classes that are not here run in transformers' own code there, or not at all.
"""

from __future__ import annotations

from lora_merge.serving.rules import Families

_ANY = r".*layers\.\d+\..*\."
_DENSE = rf"{_ANY}([qkvo]|qkv|gate|up|down|gate_up)_proj"
_ATTENTION = rf"{_ANY}([qkvo]|qkv)_proj"
_LANGUAGE = r"(model\.language_model|language_model\.model|model)\.layers\.\d+\..*\."
_IN_LANGUAGE = rf"{_LANGUAGE}([qkvo]|qkv|gate|up|down|gate_up)_proj"
_LATENT = rf"{_ANY}([qo]|q_a|q_b|kv_b|gate|up|down|gate_up)_proj|{_ANY}kv_a_proj_with_mqa"

_TABLE: tuple[tuple[str, str], ...] = (
    (
        _DENSE,
        (
            "LlamaForCausalLM Phi3ForCausalLM InternLM3ForCausalLM IQuestCoderForCausalLM MistralForCausalLM "
            "Ministral3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM "
            "CohereForCausalLM Cohere2ForCausalLM DeepseekForCausalLM Exaone4ForCausalLM GemmaForCausalLM Gemma2ForCausalLM "
            "Gemma3ForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM GraniteForCausalLM GraniteSWAForCausalLM MiMoForCausalLM "
            "OlmoForCausalLM Olmo2ForCausalLM OrionForCausalLM SDARForCausalLM SolarForCausalLM StableLmForCausalLM "
            "XverseForCausalLM NanbeigeForCausalLM HunYuanDenseV1ForCausalLM MiniCPMForCausalLM Ernie4_5_ForCausalLM"
        ),
    ),
    (
        _ATTENTION,
        (
            "MixtralForCausalLM OlmoeForCausalLM PhiMoEForCausalLM GptOssForCausalLM MiniMaxM2ForCausalLM "
            "Starcoder2ForCausalLM GraniteMoeForCausalLM GraniteMoeSharedForCausalLM PhiForCausalLM OPTForCausalLM "
            "ApertusForCausalLM ArceeForCausalLM"
        ),
    ),
    (
        _IN_LANGUAGE,
        (
            "Gemma3ForConditionalGeneration Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration "
            "Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Llama4ForConditionalGeneration "
            "Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM"
        ),
    ),
    (_LATENT, "DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM Glm4MoeLiteForCausalLM"),
)
"""Pattern of module paths → classes."""

_REFUSED = (
    "GPT2LMHeadModel GPTBigCodeForCausalLM GPTJForCausalLM ChatGLMModel BaichuanForCausalLM DbrxForCausalLM "
    "PersimmonForCausalLM Phi3SmallForCausalLM QWenLMHeadModel MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM "
    "BailingMoeForCausalLM BailingMoEForCausalLM BailingMoeV2ForCausalLM LLaDA2MoeModelLM InternLM2ForCausalLM ExaoneForCausalLM"
)
"""Classes whose layers have names that its LoRA does not know (``c_attn``, ``query_key_value``), or that have no linear
layers."""

FAMILIES = Families(
    key="class",
    served={name: pattern for pattern, names in _TABLE for name in names.split()},
    refused=frozenset(_REFUSED.split()),
    source="sglang 0.5.23, sglang/srt/models/*.py, lora/utils.py:133, lora/lora_manager.py:init_lora_modules, read",
)
