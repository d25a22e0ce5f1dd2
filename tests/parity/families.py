"""The one list of model families: what the matrix runs, and the tables of docs/supported.md.

A family has names of three eras: those it was published with, those transformers 4 had in memory, and those
transformers 5 has. An adapter speaks one of the latter two. Everything here is data and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Naming = Literal["transformers 5", "transformers 4", "ms-swift"]
"""Whose module names an adapter has; ``ms-swift`` writes a regex that matches containers too."""

Layout = Literal["published", "in memory", "Hub", "in shards"]
"""How the base lies on disk: with the names that ``save_pretrained`` writes, with those of the module tree in
transformers 5, with those on the Hub where they differ, or as published with each layer scattered over files."""

NAMINGS: tuple[Naming, ...] = ("transformers 5", "transformers 4", "ms-swift")
LAYOUTS: tuple[Layout, ...] = ("published", "in memory", "Hub", "in shards")

VOCAB = 96
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, **ENDS,
}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
HEADS_OF_16 = {"head_dim": 16}
NARROW = {**COMMON, "intermediate_size": 40}
"""For families whose experts have ``intermediate_size``: neither it nor its double is the hidden size."""
EXPERTS_OF_40 = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

IMAGE, VIDEO, IMAGE_BEGINS, IMAGE_ENDS = 90, 91, 92, 93
QWEN_IMAGES = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": IMAGE_BEGINS,
    "vision_end_token_id": IMAGE_ENDS,
}  # fmt: skip
ROPE_3D = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
PATCHES_OF_8 = {**SMALL_TOWER, "image_size": 16, "patch_size": 8}
QWEN3_TOWER = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Family:
    """One family: a tiny model of it, its names in every era, and what is adapted."""

    name: str
    """What a user calls it."""

    architecture: str
    """The class in transformers."""

    config: str
    """Its config's class."""

    fields: Mapping[str, Any]
    """What is handed to that class."""

    modules: tuple[str, ...]
    """``target_modules`` of an adapter from transformers 5."""

    parameters: tuple[str, ...] = ()
    """``target_parameters`` of an adapter from transformers 5."""

    inputs: str = "tokens"
    """Names a function of `tests.parity.family_building` that makes what the model is called with."""

    old_names: tuple[tuple[str, str], ...] = ()
    """From a module's path in transformers 5 to that in transformers 4: patterns and replacements, in order."""

    old_modules: tuple[str, ...] = ()
    """``target_modules`` of an adapter from transformers 4; empty where its names are those of 5."""

    old_parameters: tuple[str, ...] = ()
    """``target_parameters`` of an adapter from transformers 4."""

    experts: tuple[str, str, str] | None = None
    """What transformers 4 calls an expert's gate, up and down matrices, if each expert is modules of its own."""

    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Modules of transformers 4 that are several modules in 5, row by row: their names' ends."""

    swift: str = ""
    """``target_modules`` as ms-swift writes them, over the names of transformers 4."""

    in_memory: bool = False
    """The module tree's names or shapes are not the published ones, so a base may be stored either way."""

    hub: tuple[tuple[str, str], ...] = ()
    """From a published name to the Hub's: patterns and replacements."""

    hub_transposed: str = ""
    """A pattern of the tensors that the Hub stores the other way round."""

    notes: str = ""
    """What to know before reading its row."""

    def namings(self) -> tuple[Naming, ...]:
        """Return the names that its adapters come with."""
        old = bool(self.old_modules or self.old_parameters)
        has = {"transformers 5": True, "transformers 4": old, "ms-swift": bool(self.swift)}
        return tuple(naming for naming in NAMINGS if has[naming])

    def structure(self) -> tuple[bool, ...]:
        """Return what tells the work on families apart: what is stacked, joined, renamed or transposed."""
        parts = (self.experts, self.fused, self.parameters, self.in_memory, self.hub, self.hub_transposed)
        return tuple(map(bool, parts))

    def layouts(self) -> tuple[Layout, ...]:
        """Return the ways in which its checkpoints are stored."""
        has = {
            "published": True,
            "in memory": self.in_memory,
            "Hub": bool(self.hub or self.hub_transposed),
            "in shards": self.experts is not None,
        }
        return tuple(layout for layout in LAYOUTS if has[layout])


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED = ("gate_proj", "up_proj", "down_proj")
# By their parameters: as modules PEFT takes these names for the experts', and leaves the dense layers out.
DENSE = (
    *(f"layers.0.mlp.{name}.weight" for name in GATED),
    *(f"shared_experts.{name}.weight" for name in GATED),
)
STACKED = ("experts.gate_up_proj", "experts.down_proj")
SWIFT = r"^({})(?!.*(lm_head|output|emb|wte|shared)).*"
"""ms-swift 2: the modules of the language model and of the connector are filled in."""

UNDER_LANGUAGE_MODEL = (
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.", ""),
    (r"^lm_head$", "language_model.lm_head"),
)
"""Before 4.52 a language model with its own head stood inside LLaVA, InternVL and Gemma 3."""

UNDER_MODEL = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
"""Before 4.52 the tower of Qwen2-VL stood beside the language model."""

BLOCK_SPARSE = ((r"\.mlp(?=\.experts|\.gate|$)", ".block_sparse_moe"),)


def _dense(name: str, prefix: str, *modules: str, **fields: Any) -> Family:
    """Return a decoder of the usual build."""
    return Family(name, f"{prefix}ForCausalLM", f"{prefix}Config", {**COMMON, **UNTIED, **fields}, modules)


def _mixture(name: str, prefix: str, fields: Mapping[str, Any], **more: Any) -> Family:
    """Return a mixture of experts whose experts are stacked in transformers 5, and were apart before."""
    about = {
        "modules": ATTENTION,
        "parameters": STACKED,
        "old_modules": (*ATTENTION, *GATED),
        "experts": GATED,
        "in_memory": True,
        **more,
    }
    return Family(name, f"{prefix}ForCausalLM", f"{prefix}Config", {**fields, **UNTIED}, **about)


_TEXT: tuple[Family, ...] = (
    _dense("Llama", "Llama", "q_proj", "v_proj", "down_proj", "lm_head"),
    _dense("Mistral", "Mistral", "q_proj", "up_proj", "embed_tokens"),
    _dense("Qwen2", "Qwen2", *ATTENTION, *GATED, tie_word_embeddings=True),
    _dense("Qwen3", "Qwen3", *ATTENTION, *GATED, **HEADS_OF_16),
    _dense("Gemma 2", "Gemma2", *ATTENTION, *GATED, tie_word_embeddings=True, **HEADS_OF_16),
    Family(
        "Gemma 3, text",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**COMMON, **HEADS_OF_16},
        (*ATTENTION, *GATED),
    ),
    _dense("Phi-3", "Phi3", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", pad_token_id=0),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, **ENDS},
        ("c_attn", "c_proj", "c_fc"),
        hub=((r"^transformer\.", ""),),
        notes="the Hub's names lack `transformer.`",
    ),
    Family(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": VOCAB, "max_position_embeddings": 64, **ENDS,
        },
        ("query_key_value", "dense_h_to_4h", "dense_4h_to_h", "lm_head"),
        old_names=((r"^lm_head$", "embed_out"),),
        old_modules=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "embed_out"),
        in_memory=True,
    ),
    _dense(
        "Falcon-H1",
        "FalconH1",
        *ATTENTION,
        "in_proj",
        "gate_proj",
        **HEADS_OF_16,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_expand=2,
    ),
    Family(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8,
            "intermediate_size": 80, **ENDS,
        },
        ("in_proj", "x_proj"),
    ),
)  # fmt: skip

_MIXTURES: tuple[Family, ...] = (
    _mixture(
        "Mixtral",
        "Mixtral",
        {**NARROW, **LOCAL_EXPERTS},
        parameters=(*STACKED, "mlp.gate.weight"),
        old_names=BLOCK_SPARSE,
        old_modules=(*ATTENTION, "gate", "w1", "w2", "w3"),
        experts=("w1", "w3", "w2"),
    ),
    _mixture(
        "Qwen2-MoE",
        "Qwen2Moe",
        {
            **COMMON, **EXPERTS_OF_40, "num_experts": 4, "shared_expert_intermediate_size": 48,
            "mlp_only_layers": [0],
        },
        modules=(*ATTENTION, *GATED, "shared_expert_gate"),
        old_modules=(*ATTENTION, *GATED, "gate", "shared_expert_gate"),
    ),
    _mixture(
        "Qwen3-MoE",
        "Qwen3Moe",
        {**COMMON, **EXPERTS_OF_40, **HEADS_OF_16, "num_experts": 4},
        modules=(*ATTENTION, "lm_head"),
        parameters=(*STACKED, "mlp.gate.weight"),
        old_modules=(*ATTENTION, *GATED, "gate", "lm_head"),
    ),
    _mixture(
        "DeepSeek-V3",
        "DeepseekV3",
        {
            **COMMON, **EXPERTS_OF_40, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1,
        },
        modules=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        parameters=(*STACKED, *DENSE),
        old_modules=("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *GATED),
    ),
    _mixture(
        "GLM-4-MoE",
        "Glm4Moe",
        {
            **COMMON, **EXPERTS_OF_40, **HEADS_OF_16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
            "first_k_dense_replace": 1, "n_shared_experts": 1,
        },
        parameters=(*STACKED, *DENSE),
    ),
    Family(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {**NARROW, **LOCAL_EXPERTS, **HEADS_OF_16, **UNTIED, "sliding_window": 8},
        ATTENTION,
        (*STACKED, "router.weight"),
    ),
    Family(
        "Llama 4, text",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **NARROW, **HEADS_OF_16, **UNTIED, "intermediate_size_mlp": 48, "num_local_experts": 4,
            "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "pad_token_id": 0,
        },
        (*ATTENTION, *GATED),
        STACKED,
    ),
    Family(
        "Granite-MoE",
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**NARROW, **LOCAL_EXPERTS, **UNTIED},
        ATTENTION,
        STACKED,
        old_names=((r"(block_sparse_moe\.router)$", r"\1.layer"),),
        old_modules=(*ATTENTION, "router.layer"),
        old_parameters=("input_linear.weight", "output_linear.weight"),
        in_memory=True,
        notes="its experts were stacked in transformers 4, as `input_linear` and `output_linear`",
    ),
    _mixture("OLMoE", "Olmoe", {**NARROW, "num_experts": 4, "num_experts_per_tok": 2}),
    _mixture(
        "Phi-3.5-MoE",
        "Phimoe",
        {**NARROW, **LOCAL_EXPERTS},
        old_names=((r"\.mlp\.router$", ".block_sparse_moe.gate"), *BLOCK_SPARSE),
        old_modules=(*ATTENTION, "gate", "w1", "w2", "w3"),
        experts=("w1", "w3", "w2"),
    ),
    _mixture(
        "Jamba",
        "Jamba",
        {
            **NARROW, "num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2,
            "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8,
            "mamba_dt_rank": 8, "use_mamba_kernels": False,
        },
        modules=(*ATTENTION, *(f"feed_forward.{name}" for name in GATED), "in_proj"),
        old_modules=(*ATTENTION, *GATED, "in_proj", "router"),
    ),
    _mixture(
        "ERNIE 4.5 MoE",
        "Ernie4_5_Moe",
        {
            **COMMON, "moe_intermediate_size": 40, "moe_num_experts": 4, "moe_k": 2,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        },
        parameters=(*STACKED, *DENSE),
    ),
)  # fmt: skip

_IMAGES: tuple[Family, ...] = (
    Family(
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {
            "text_config": {**COMMON, **UNTIED, "rope_parameters": ROPE_3D},
            "vision_config": {
                "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2,
                "patch_size": 4, "in_channels": 3,
            },
            **QWEN_IMAGES, **UNTIED,
        },
        ("q_proj", "v_proj", "down_proj", "qkv", "fc1", "mlp.0", "lm_head"),
        inputs="patches",
        old_names=UNDER_MODEL,
        old_modules=("q_proj", "v_proj", "down_proj", "qkv", "fc1", "mlp.0", "lm_head"),
        swift=SWIFT.format("model"),
        in_memory=True,
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {
            "text_config": {**COMMON, **UNTIED, "rope_parameters": ROPE_3D},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64,
                "fullatt_block_indexes": [0], "patch_size": 4, "window_size": 16,
            },
            **QWEN_IMAGES, **UNTIED,
        },
        ("q_proj", "o_proj", "qkv", "gate_proj", "mlp.2"),
        inputs="patches",
        old_names=UNDER_MODEL,
        old_modules=("q_proj", "o_proj", "qkv", "gate_proj", "mlp.2"),
        swift=SWIFT.format("model|visual.merger"),
        in_memory=True,
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {
                **COMMON, **HEADS_OF_16, **UNTIED, "rope_parameters": {**ROPE_3D, "mrope_interleaved": True},
            },
            "vision_config": QWEN3_TOWER, **QWEN_IMAGES, **UNTIED,
        },
        ("q_proj", "v_proj", "up_proj", "qkv", "linear_fc1"),
        inputs="patches",
        swift=SWIFT.format("model.language_model"),
    ),
    Family(
        "Qwen3-VL-MoE",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {
            "text_config": {
                **COMMON, **EXPERTS_OF_40, **HEADS_OF_16, **UNTIED, "num_experts": 4,
                "rope_parameters": {**ROPE_3D, "mrope_interleaved": True},
            },
            "vision_config": QWEN3_TOWER, **QWEN_IMAGES, **UNTIED,
        },
        ("q_proj", "v_proj", "qkv"),
        STACKED,
        inputs="patches",
        hub_transposed=r"\.experts\.(gate_up|down)_proj$",
        notes="the Hub stores its experts the other way round",
    ),
    Family(
        "Llama 4",
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        {
            "text_config": {
                **NARROW, **HEADS_OF_16, **UNTIED, "intermediate_size_mlp": 48, "num_local_experts": 4,
                "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "pad_token_id": 0,
            },
            "vision_config": {
                **SMALL_TOWER, "intermediate_size": 128, "image_size": 16, "patch_size": 4,
                "vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48,
                "pixel_shuffle_ratio": 0.5, "multi_modal_projector_bias": False,
            },
            "image_token_index": IMAGE, "boi_token_index": 91, "eoi_token_index": 92, **UNTIED,
        },
        ("q_proj", "o_proj", "down_proj", "fc1", "linear_1"),
        STACKED,
        inputs="image",
    ),
    Family(
        "LLaVA",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {**COMMON, **UNTIED, "model_type": "llama"},
            "vision_config": {**PATCHES_OF_8, "model_type": "clip_vision_model"},
            "image_token_index": IMAGE, **UNTIED,
        },
        ("q_proj", "v_proj", "down_proj", "linear_1", "lm_head"),
        inputs="image",
        hub=((r"^vision_tower\.", "vision_tower.vision_model."),),
        old_names=(
            (r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model."), *UNDER_LANGUAGE_MODEL,
        ),
        old_modules=("q_proj", "v_proj", "down_proj", "linear_1", "lm_head"),
        swift=SWIFT.format("language_model|multi_modal_projector"),
        in_memory=True,
    ),
    Family(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {
            "text_config": {**COMMON, **HEADS_OF_16, "sliding_window": 16},
            "vision_config": {**PATCHES_OF_8, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        ("q_proj", "v_proj", "gate_proj", "fc1"),
        inputs="image_and_types",
        hub=((r"^vision_tower\.", "vision_tower.vision_model."),),
        old_names=(
            (r"^model\.vision_tower\.(?!vision_model)", "vision_tower.vision_model."), *UNDER_LANGUAGE_MODEL,
        ),
        old_modules=("q_proj", "v_proj", "gate_proj"),
        swift=SWIFT.format("language_model|multi_modal_projector"),
        in_memory=True,
    ),
    Family(
        "InternVL",
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {
            "text_config": {**COMMON, **UNTIED, "model_type": "qwen2"},
            "vision_config": {**SMALL_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE, "downsample_ratio": 0.5, **UNTIED,
        },
        ("q_proj", "o_proj", "up_proj", "linear_2", "lm_head"),
        inputs="image",
        old_names=UNDER_LANGUAGE_MODEL,
        old_modules=("q_proj", "o_proj", "up_proj", "linear_2", "lm_head"),
        swift=SWIFT.format("language_model|multi_modal_projector"),
        in_memory=True,
        notes="the checkpoints named `-hf`; those with code of their own have a test of theirs",
    ),
    Family(
        "ERNIE 4.5 VL MoE",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Ernie4_5_VLMoeConfig",
        {
            "text_config": {
                **COMMON, "moe_intermediate_size": [40, 24], "moe_num_experts": 4, "moe_k": 2,
                "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [3, 3, 2]},
            },
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
                "spatial_merge_size": 2,
            },
            "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": IMAGE_BEGINS,
            "image_end_token_id": IMAGE_ENDS,
        },
        (*ATTENTION, "qkv", "fc1"),
        STACKED,
        inputs="small_patches",
        in_memory=True,
        notes="experts of text and of images are one list when published",
    ),
)  # fmt: skip

_OTHERS: tuple[Family, ...] = (
    Family(
        "BERT",
        "BertForMaskedLM",
        "BertConfig",
        {
            "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": VOCAB, "max_position_embeddings": 64,
        },
        ("query", "value", "intermediate.dense"),
    ),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 80, "num_layers": 2, "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ("q", "v", "wo"),
        inputs="pairs",
    ),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCAB, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80,
            "decoder_ffn_dim": 80, "num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32,
            "pad_token_id": 0, "decoder_start_token_id": 1, **ENDS,
        },
        ("q_proj", "v_proj", "fc2"),
        inputs="sound",
    ),
    Family(
        "DINOv2",
        "Dinov2Model",
        "Dinov2Config",
        {
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2,
            "image_size": 16, "patch_size": 8, "use_swiglu_ffn": True,
        },
        ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
        inputs="pixels",
        old_names=(
            (r"\.attention\.q_proj$", ".attention.attention.query"),
            (r"\.attention\.k_proj$", ".attention.attention.key"),
            (r"\.attention\.v_proj$", ".attention.attention.value"),
            (r"\.attention\.o_proj$", ".attention.output.dense"),
            (r"\.mlp\.down_proj$", ".mlp.weights_out"),
        ),
        old_modules=("query", "value", "weights_in", "weights_out"),
        fused={"mlp.weights_in": ("mlp.gate_proj", "mlp.up_proj")},
        in_memory=True,
        notes="gate and up are one matrix when published",
    ),
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (*_TEXT, *_MIXTURES, *_IMAGES, *_OTHERS)


def cells() -> Iterator[tuple[Family, Naming, Layout]]:
    """Yield the matrix."""
    for family in FAMILIES:
        for naming in family.namings():
            for layout in family.layouts():
                yield family, naming, layout
