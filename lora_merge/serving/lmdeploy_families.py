"""Model classes of LMDeploy 0.18.0's PyTorch engine, and which of their modules its LoRA finds.

LMDeploy looks for the last part of a target's path among its own modules, and for q, k, v, gate and up in the class's
``packed_modules_mapping``.

Reference:
    ``lmdeploy/pytorch/models/module_map.py`` (``MODULE_MAP``; any other class raises RuntimeError), the classes that it
    names, and ``lmdeploy/pytorch/adapter/adapter.py:find_all_target``.
"""

from __future__ import annotations

from lora_merge.serving.rules import Families

_DENSE = r".*\.([qkvo]|gate|up|down)_proj"
_ATTENTION = r".*\.[qkvo]_proj"
_UNPACKED_FUSED = r".*\.([qkvo]|gate|up|down|qkv|gate_up)_proj"
_LATENT = r".*\.(q|o|gate|up|down|q_a|q_b|kv_b)_proj|.*\.kv_a_proj_with_mqa"

_UNPACKED = (
    "mixtral deepseek_v2 deepseek_v3 deepseek_v32 llama4 llava llava_next phimoe glm4 glm4_moe_lite glm_moe_dsa gemma3 "
    "internvl internvl_chat interns1"
)
UNPACKED = frozenset(_UNPACKED.split())
"""Families whose classes pack modules but have no ``packed_modules_mapping``, so that LoRA on parts is not found."""

_TABLE: tuple[tuple[str, str], ...] = (
    (
        _DENSE,
        (
            "LlamaForCausalLM MistralForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM "
            "Gemma3ForConditionalGeneration DeepseekForCausalLM HYV3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM "
            "Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration "
            "Qwen3VLMoeForConditionalGeneration Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration "
            "Glm4MoeForCausalLM Llama4ForConditionalGeneration LlavaForConditionalGeneration "
            "LlavaNextForConditionalGeneration InternLM3ForCausalLM SDARForCausalLM SDARMoeForCausalLM "
            "InternVLForConditionalGeneration InternS1ForConditionalGeneration Glm4vForConditionalGeneration"
        ),
    ),
    (
        r".*\.([qkvo]|gate|up|down)_proj|.*\.attn\.(qkv|proj)",
        "Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration",
    ),
    (_UNPACKED_FUSED, "Phi3ForCausalLM Phi3VForCausalLM Glm4ForCausalLM"),
    (_ATTENTION, "GptOssForCausalLM MixtralForCausalLM PhiMoEForCausalLM"),
    (_LATENT, "DeepseekV2ForCausalLM DeepseekV3ForCausalLM Glm4MoeLiteForCausalLM MiniCPM3ForCausalLM"),
    (r".*\.(wqkv|wo|w1|w2|w3)", "InternLM2ForCausalLM"),
    (r".*\.(wqkv|wo|w2|o_proj|down_proj)", "InternVLChatModel"),
    (r".*\.(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)", "ChatGLMForConditionalGeneration"),
)
"""Pattern of module paths → classes."""

# Classes of the table whose modules were not determined.
_UNKNOWN = (
    "GlmMoeDsaForCausalLM KimiK25ForConditionalGeneration Kimi_K25ForConditionalGeneration DeepseekV32ForCausalLM "
    "DeepseekV4ForCausalLM DeepseekVLV2ForCausalLM InternS2PreviewForConditionalGeneration InternS2PreviewForCausalLM "
    "MetaMoeForConditionalGeneration InternS2MobiusForConditionalGeneration InternS2MobiusForCausalLM "
    "Qwen3OmniMoeForConditionalGeneration CogVLMForCausalLM InternS1ProForConditionalGeneration "
    "InternS1_1_ForConditionalGeneration MiniCPMV InternLM2ForRewardModel Qwen2ForRewardModel"
)

FAMILIES = Families(
    key="class",
    served={name: pattern for pattern, names in _TABLE for name in names.split()},
    unknown=frozenset(_UNKNOWN.split()),
    is_complete=True,
    lacking="does not find",
    source="lmdeploy 0.18.0, lmdeploy/pytorch/models/module_map.py and adapter/adapter.py:30, read",
)
