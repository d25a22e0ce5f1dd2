"""The one list of what real engines are asked to load: a tiny model of each family, and an adapter for it.

Engines' kernels want more of a model than transformers does, and none of these is smaller than they take: heads of
at least 32, experts and latent attention of the sizes that they are written for. Everything here is data and imports
nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Engine = Literal["vllm", "lmdeploy", "turbomind"]
ENGINES: Mapping[Engine, str] = {
    "vllm": "vLLM",
    "lmdeploy": "LMDeploy, PyTorch engine",
    "turbomind": "LMDeploy, TurboMind",
}

VOCAB = 96
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
HEADS_OF_32 = {"head_dim": 32}
WINDOW = {"sliding_window": 8}
"""Shorter than what is generated, so that it matters."""

PER_WIDTH = {"attention_multiplier": 1 / 32}
"""Scores over the width of a head, as published Granites have them; their config's default does not scale at all."""

LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SMALL_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
WHOLE_HEADS = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
"""For LMDeploy, whose operators for CPUs rotate no less."""

GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
ROPE_3D = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}

IMAGE, VIDEO, IMAGE_BEGINS, IMAGE_ENDS = 90, 91, 92, 93
IMAGE_TOKEN, VIDEO_TOKEN, BEGIN_TOKEN, END_TOKEN = (f"w{n - 3}" for n in range(IMAGE, IMAGE_ENDS + 1))
QWEN_IMAGES = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": IMAGE_BEGINS,
    "vision_end_token_id": IMAGE_ENDS,
}  # fmt: skip

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
STACKED = ("experts.gate_up_proj", "experts.down_proj")
SWIFT = rf"^(model)(?!.*(lm_head|output|emb|wte|shared)).*\.({'|'.join(ATTENTION + GATED)})$"
"""A regex as ms-swift writes ``target_modules``."""


@dataclass(frozen=True, slots=True)
class Model:
    """A family's tiny model."""

    name: str
    """What a user calls it."""

    architecture: str
    """The class in transformers."""

    config: str
    """Its config's class."""

    fields: Mapping[str, Any] = field(hash=False)
    """What is handed to that class."""

    files: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Small files beside the weights that an engine wants to see: JSON by name."""

    special_tokens: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What its processor asks the tokenizer for by name."""

    words: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Words of the tokenizer that have to be others."""

    published: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What published configs say, and those that transformers writes do not."""

    hub: tuple[tuple[str, str], ...] = ()
    """From a name that transformers writes to the Hub's, where engines know only that: patterns and replacements."""

    is_internlm2: bool = False
    """The model is stored as InternLM2, for which transformers has no class."""


@dataclass(frozen=True, slots=True)
class Unserved:
    """Why an engine does not take a family."""

    says: str
    """A part of its error."""

    means: str = "does not know the family"


UNKNOWN: Mapping[Engine, Unserved] = {
    "lmdeploy": Unserved("Can not found rewrite for architectures"),
    "turbomind": Unserved("TurboMind does not know"),
}


def _unknown_to(*engines: Engine) -> dict[Engine, Unserved]:
    return {engine: UNKNOWN[engine] for engine in engines}


NO_TURBOMIND = _unknown_to("turbomind")
NO_LMDEPLOY = _unknown_to("lmdeploy", "turbomind")


@dataclass(frozen=True, slots=True)
class Case:
    """A model and an adapter for it, merged and served."""

    model: Model
    adapter: str
    """What a user calls the adapter."""

    lora: Mapping[str, Any]
    """What ``LoraConfig`` is told, beside rank and alpha where it does not say them."""

    unserved: Mapping[Engine, Unserved] = field(default_factory=dict)
    """Engines that do not take it, merged or not."""

    otherwise: Mapping[Engine, str] = field(default_factory=dict)
    """Engines that compute something else than transformers, of the base already; and what of it is known."""

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.adapter}"


def _dense(name: str, prefix: str, **fields: Any) -> Model:
    """Return a decoder of the usual build."""
    return Model(name, f"{prefix}ForCausalLM", f"{prefix}Config", {**COMMON, **UNTIED, **fields})


def _lora(*modules: str, parameters: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """Return a LoRA's fields."""
    return {"target_modules": list(modules), "target_parameters": list(parameters) or None, **fields}


LLAMA = _dense("Llama", "Llama", **HEADS_OF_32)
LLAMA_TIED = _dense("Llama, tied", "Llama", **HEADS_OF_32, **TIED)
QWEN2 = _dense("Qwen2", "Qwen2")
QWEN3 = _dense("Qwen3", "Qwen3", **HEADS_OF_32)
INTERNLM2 = Model(
    "InternLM2", "LlamaForCausalLM", "LlamaConfig", {**LLAMA.fields, "pad_token_id": 0}, is_internlm2=True
)
ALL_LINEAR = _lora(*ATTENTION, *GATED)

PLAIN = Case(LLAMA, "LoRA", _lora(*ATTENTION, *GATED, "lm_head"))
UNTIED_BY_MERGE = Case(LLAMA_TIED, "LoRA on the embedding", _lora(*ATTENTION, "embed_tokens"))

# What engines refuse as an adapter, or serve wrongly, has to be served as a checkpoint.
_ADAPTERS: tuple[Case, ...] = (
    PLAIN,
    Case(LLAMA, "rsLoRA of rank 24", {**ALL_LINEAR, "r": 24, "use_rslora": True}),
    Case(
        LLAMA,
        "LoRA with patterns",
        {**ALL_LINEAR, "rank_pattern": {"q_proj": 3, "down_proj": 24}, "alpha_pattern": {"o_proj": 40}},
    ),
    Case(LLAMA, "LoRA by a regex of ms-swift", {"target_modules": SWIFT}),
    Case(LLAMA, "LoRA on some layers", {**ALL_LINEAR, "layers_to_transform": [1]}),
    Case(LLAMA, "DoRA", {**ALL_LINEAR, "use_dora": True}),
    Case(LLAMA, "LoRA and modules_to_save", {**ALL_LINEAR, "modules_to_save": ["lm_head", "embed_tokens"]}),
    Case(LLAMA, "LoRA and trained tokens", {**ALL_LINEAR, "trainable_token_indices": [5, 17, 94]}),
    Case(LLAMA_TIED, "LoRA", ALL_LINEAR),
    UNTIED_BY_MERGE,
)

_DENSE: tuple[Case, ...] = (
    Case(_dense("Mistral", "Mistral", **HEADS_OF_32, **WINDOW), "LoRA", ALL_LINEAR, NO_TURBOMIND),
    Case(QWEN2, "LoRA", ALL_LINEAR),
    Case(QWEN3, "LoRA", ALL_LINEAR),
    Case(
        _dense("Phi-3", "Phi3", pad_token_id=0),
        "LoRA",
        _lora("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        NO_TURBOMIND,
    ),
    Case(
        Model(
            "Gemma 3, text",
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            {
                **COMMON, **HEADS_OF_32, **WINDOW, "pad_token_id": 0,
                "rope_parameters": GEMMA_ROPE,
            },
        ),
        "LoRA",
        ALL_LINEAR,
        NO_TURBOMIND,
    ),
    Case(
        _dense("Gemma 2", "Gemma2", **HEADS_OF_32, **WINDOW, **TIED, pad_token_id=0),
        "LoRA",
        ALL_LINEAR,
        NO_TURBOMIND,
    ),
    Case(_dense("Granite", "Granite", **PER_WIDTH), "LoRA", ALL_LINEAR, NO_LMDEPLOY),
    Case(
        _dense("GLM-4", "Glm4", **HEADS_OF_32, pad_token_id=0),
        "LoRA",
        _lora(*ATTENTION, "gate_up_proj", "down_proj"),
        NO_TURBOMIND,
    ),
    Case(
        Model(
            "GPT-2",
            "GPT2LMHeadModel",
            "GPT2Config",
            {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, **ENDS},
        ),
        "LoRA",
        _lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True),
        NO_LMDEPLOY,
    ),
    Case(
        Model(
            "GPT-NeoX",
            "GPTNeoXForCausalLM",
            "GPTNeoXConfig",
            {
                "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
                "vocab_size": VOCAB, "max_position_embeddings": 64, **ENDS,
            },
        ),
        "LoRA",
        _lora("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
        NO_LMDEPLOY,
    ),
    Case(
        _dense(
            "Falcon-H1", "FalconH1", **HEADS_OF_32, mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32,
            mamba_n_groups=1, mamba_d_state=16, mamba_expand=2, pad_token_id=0,
        ),
        "LoRA",
        _lora(*ATTENTION, "in_proj", "gate_proj"),
        NO_LMDEPLOY,
    ),
    Case(INTERNLM2, "LoRA", _lora("wqkv", "wo", "w1", "w2", "w3")),
)  # fmt: skip


def _mixture(
    name: str,
    prefix: str,
    fields: Mapping[str, Any],
    *modules: str,
    unserved: Mapping[Engine, Unserved] = MappingProxyType({}),
    otherwise: Mapping[Engine, str] = MappingProxyType({}),
    published: Mapping[str, Any] = MappingProxyType({}),
) -> Case:
    """Return a mixture of experts with an adapter of its experts and of other modules."""
    architecture = f"{prefix}ForCausalLM"
    model = Model(name, architecture, f"{prefix}Config", {**COMMON, **UNTIED, **fields}, published=published)
    return Case(model, "LoRA of experts too", _lora(*modules, parameters=STACKED), unserved, otherwise)


_MIXTURES: tuple[Case, ...] = (
    _mixture("Mixtral", "Mixtral", {**LOCAL_EXPERTS, **HEADS_OF_32, "sliding_window": None}, *ATTENTION),
    _mixture(
        "Qwen3-MoE",
        "Qwen3Moe",
        {**SMALL_EXPERTS, **HEADS_OF_32, "num_experts": 4, "norm_topk_prob": True},
        *ATTENTION,
        "lm_head",
    ),
    _mixture("gpt-oss", "GptOss", {**LOCAL_EXPERTS, **HEADS_OF_32, **WINDOW, "pad_token_id": 0}, *ATTENTION),
    _mixture(
        "DeepSeek-V3",
        "DeepseekV3",
        {
            **SMALL_EXPERTS, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 512,
            "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 8,
            "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.0, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
            "moe_layer_freq": 1, "rope_parameters": YARN, "pad_token_id": 0,
        },
        *LATENT,
        unserved=NO_TURBOMIND,
    ),
    _mixture(
        "Qwen2-MoE",
        "Qwen2Moe",
        {**SMALL_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 96},
        *ATTENTION,
        *GATED,
        "shared_expert_gate",
    ),
    _mixture(
        "OLMoE",
        "Olmoe",
        {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64, "pad_token_id": 0},
        *ATTENTION,
        unserved=NO_LMDEPLOY,
    ),
    Case(
        Model(
            "Phi-3.5-MoE",
            "PhimoeForCausalLM",
            "PhimoeConfig",
            {
                **COMMON, **UNTIED, **LOCAL_EXPERTS, "intermediate_size": 64, "attention_bias": True,
                "lm_head_bias": True,
            },
            published={"architectures": ["PhiMoEForCausalLM"]},
        ),
        "LoRA",
        _lora(*ATTENTION),
        {**NO_TURBOMIND, "lmdeploy": Unserved("KeyError: 'type'", "asks for the rope of the published models")},
        {"vllm": ""},
    ),
    _mixture(
        "Granite-MoE",
        "GraniteMoe",
        {**LOCAL_EXPERTS, **PER_WIDTH, "intermediate_size": 64, "pad_token_id": 0},
        *ATTENTION,
        unserved=NO_LMDEPLOY,
    ),
    _mixture(
        "GLM-4-MoE",
        "Glm4Moe",
        {
            **SMALL_EXPERTS, **HEADS_OF_32, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "n_shared_experts": 1, "pad_token_id": 0,
            "rope_parameters": WHOLE_HEADS,
        },
        *ATTENTION,
        unserved=NO_TURBOMIND,
        otherwise={"lmdeploy": "it chooses experts by softmax, not by sigmoid and bias"},
        published={"partial_rotary_factor": 1.0},
    ),
)  # fmt: skip

UNDER_VISION_MODEL = ((r"^vision_tower\.", "vision_tower.vision_model."),)
VISION = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_TOWER = {"depth": 2, "num_heads": 2, "patch_size": 14}
PIXELS = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _qwen_files(name: str, patch: int) -> dict[str, Any]:
    """Return what the processor of a Qwen that sees is made from."""
    sizes = {"patch_size": patch, "temporal_patch_size": 2, "merge_size": 2, **PIXELS}
    pixels = {"min_pixels": 4 * patch**2, "max_pixels": 64 * patch**2}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": f"{name}Processor",
            **sizes,
            **pixels,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": f"{'Qwen3' if patch == 16 else 'Qwen2'}VLVideoProcessor",
            "processor_class": f"{name}Processor",
            **sizes,
            "size": {"shortest_edge": 4 * patch**2, "longest_edge": 64 * patch**2},
        },
    }


_IMAGES: tuple[Case, ...] = (
    Case(
        Model(
            "Qwen2-VL",
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLConfig",
            {
                "text_config": {**COMMON, **UNTIED, "rope_parameters": ROPE_3D},
                "vision_config": {**QWEN_TOWER, "embed_dim": 128, "hidden_size": 128, "mlp_ratio": 2},
                **QWEN_IMAGES, **UNTIED, **ENDS,
            },
            _qwen_files("Qwen2VL", 14),
        ),
        "LoRA of the tower too",
        _lora(*ATTENTION, *GATED, "qkv", "attn.proj", "fc1", "fc2", "mlp.0", "mlp.2"),
    ),
    Case(
        Model(
            "Qwen2.5-VL",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5_VLConfig",
            {
                "text_config": {**COMMON, **UNTIED, "rope_parameters": ROPE_3D},
                "vision_config": {
                    **QWEN_TOWER, "hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 128,
                    "fullatt_block_indexes": [1], "window_size": 56,
                },
                **QWEN_IMAGES, **UNTIED, **ENDS,
            },
            _qwen_files("Qwen2_5_VL", 14),
        ),
        "LoRA of the tower too",
        _lora(*ATTENTION, *GATED, "qkv", "attn.proj", "mlp.0", "mlp.2"),
    ),
    Case(
        Model(
            "Qwen3-VL",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLConfig",
            {
                "text_config": {
                    **COMMON, **HEADS_OF_32, **UNTIED, "rope_parameters": {**ROPE_3D, "mrope_interleaved": True},
                },
                "vision_config": {
                    **QWEN_TOWER, "hidden_size": 128, "intermediate_size": 192, "out_hidden_size": 128,
                    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 16,
                },
                **QWEN_IMAGES, **UNTIED, **ENDS,
            },
            _qwen_files("Qwen3VL", 16),
        ),
        "LoRA of the tower too",
        _lora(*ATTENTION, *GATED, "qkv", "attn.proj", "linear_fc1", "linear_fc2"),
        NO_TURBOMIND,
    ),
    Case(
        Model(
            "LLaVA",
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {
                "text_config": {
                    **COMMON, **HEADS_OF_32, **UNTIED, "model_type": "llama", "architectures": ["LlamaForCausalLM"],
                },
                "vision_config": {
                    **VISION, "image_size": 28, "patch_size": 14, "model_type": "clip_vision_model",
                },
                "image_token_index": IMAGE, "image_seq_length": 4, **UNTIED, **ENDS,
            },
            {
                "preprocessor_config.json": {
                    "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
                    "size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **PIXELS,
                },
                "processor_config.json": {
                    "processor_class": "LlavaProcessor", "patch_size": 14, "image_token": IMAGE_TOKEN,
                    "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1,
                },
            },
            hub=UNDER_VISION_MODEL,
        ),
        "LoRA of the tower too",
        _lora(*ATTENTION, *GATED, "out_proj", "fc1", "fc2", "linear_1", "linear_2", "lm_head"),
        NO_TURBOMIND,
    ),
    Case(
        Model(
            "InternVL",
            "InternVLForConditionalGeneration",
            "InternVLConfig",
            {
                "text_config": {
                    **COMMON, **UNTIED, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"],
                },
                "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
                "image_token_id": IMAGE, "image_seq_length": 1, "downsample_ratio": 0.5, **UNTIED, **ENDS,
            },
            {
                "preprocessor_config.json": {
                    "image_processor_type": "GotOcr2ImageProcessor", "processor_class": "InternVLProcessor",
                    "size": {"height": 28, "width": 28}, **PIXELS,
                },
            },
            special_tokens={
                "context_image_token": IMAGE_TOKEN, "start_image_token": BEGIN_TOKEN,
                "end_image_token": END_TOKEN, "video_token": VIDEO_TOKEN,
            },
        ),
        "LoRA of the tower too",
        _lora(*ATTENTION, *GATED, "projection_layer", "fc1", "fc2", "linear_1", "linear_2", "lm_head"),
    ),
    Case(
        Model(
            "Gemma 3",
            "Gemma3ForConditionalGeneration",
            "Gemma3Config",
            {
                "text_config": {**COMMON, **HEADS_OF_32, **WINDOW, "pad_token_id": 0, "rope_parameters": GEMMA_ROPE},
                "vision_config": {
                    **VISION, "image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model",
                },
                "mm_tokens_per_image": 1, "image_token_index": IMAGE, "boi_token_index": 91,
                "eoi_token_index": 92, **ENDS,
            },
            {
                "preprocessor_config.json": {
                    "image_processor_type": "Gemma3ImageProcessor", "processor_class": "Gemma3Processor",
                    "size": {"height": 28, "width": 28}, **PIXELS,
                },
                "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 1},
            },
            special_tokens={"image_token": IMAGE_TOKEN, "boi_token": BEGIN_TOKEN, "eoi_token": END_TOKEN},
            words={f"w{n}": "\n" * n for n in range(1, 5)},  # vLLM looks for line breaks around an image
            hub=UNDER_VISION_MODEL,
        ),
        "LoRA of the tower too",
        _lora(*ATTENTION, *GATED, "out_proj", "fc1", "fc2"),
        NO_TURBOMIND,
    ),
    Case(
        Model(
            "Llama 4",
            "Llama4ForConditionalGeneration",
            "Llama4Config",
            {
                "text_config": {
                    **COMMON, **HEADS_OF_32, **UNTIED, "intermediate_size": 64, "intermediate_size_mlp": 192,
                    "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
                    "pad_token_id": 0, "use_qk_norm": False,
                },
                "vision_config": {
                    **VISION, "intermediate_size": 512, "image_size": 28, "patch_size": 14,
                    "vision_output_dim": 128, "projector_input_dim": 128, "projector_output_dim": 128,
                    "pixel_shuffle_ratio": 0.5, "multi_modal_projector_bias": False,
                },
                "image_token_index": IMAGE, "boi_token_index": 91, "eoi_token_index": 92, **UNTIED, **ENDS,
            },
            {
                "preprocessor_config.json": {
                    "image_processor_type": "Llama4ImageProcessorFast", "processor_class": "Llama4Processor",
                    "size": {"height": 28, "width": 28}, **PIXELS,
                },
                "processor_config.json": {
                    "processor_class": "Llama4Processor", "patch_size": 14, "pixel_shuffle_ratio": 0.5,
                },
            },
        ),
        "LoRA of experts and the tower too",
        _lora(*ATTENTION, "fc1", "fc2", "linear_1", parameters=STACKED),
        NO_TURBOMIND,
    ),
)  # fmt: skip

CASES: tuple[Case, ...] = (*_ADAPTERS, *_DENSE, *_MIXTURES, *_IMAGES)
