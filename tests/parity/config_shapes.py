"""Shapes of real ``adapter_config.json`` files: which fields there are, and what stands in them.

They were taken from some 500 configs of public repositories: PEFT 0.2 to 0.21, trainers on top of it, and formats
that are not PEFT's. Names, paths, and sizes are not those of the originals: ranks fit a tiny model. Everything here
is data; `tests.parity.method_shapes` has PEFT's other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Shape:
    """One config, and what is to become of its adapter."""

    where: str
    """Who writes such a config: a release of PEFT, a trainer."""

    config: Mapping[str, Any]
    """The whole of it."""

    base: str = "Llama"
    """A family of `tests.parity.families` or of `tests.parity.shape_building`."""

    trained: str = ""
    """The class in transformers that was trained, if not the one of the checkpoint."""

    built_with: Mapping[str, Any] = field(default_factory=dict)
    """What today's PEFT is told instead to write the tensors, where it cannot read the config."""

    refused: str = ""
    """The issue's code if it has to be refused."""

    says: str = ""
    """What that issue has to say."""

    options: Mapping[str, Any] = field(default_factory=dict)
    """What the user has to add."""


RELEASES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (
        "0.2",
        {
            "base_model_name_or_path": "models/base", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
            "lora_alpha": 8, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 4,
            "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        },
    ),
    ("0.3", {"init_lora_weights": True}),
    ("0.4", {"layers_pattern": None, "layers_to_transform": None, "revision": None}),
    ("0.5", {"auto_mapping": None}),
    ("0.6", {"alpha_pattern": {}, "rank_pattern": {}}),
    ("0.7", {"loftq_config": {}, "megatron_config": None, "megatron_core": "megatron.core"}),
    ("0.8", {"use_rslora": False}),
    ("0.9", {"use_dora": False}),
    ("0.10", {"layer_replication": None}),
    ("0.14", {"eva_config": None, "exclude_modules": None, "lora_bias": False}),
    ("0.14.1", {"corda_config": None}),
    ("0.15", {"trainable_token_indices": None}),
    ("0.16", {"qalora_group_size": 16, "use_qalora": False}),
    ("0.17", {"target_parameters": None}),
    (
        "0.18",
        {
            "alora_invocation_tokens": None, "arrow_config": None, "ensure_weight_tying": False,
            "peft_version": "0.18.1",
        },
    ),
    ("0.19", {"lora_ga_config": None, "use_bdlora": None, "peft_version": "0.19.1"}),
    ("0.20", {"monteclora_config": None, "velora_config": None, "peft_version": "0.20.0"}),
)  # fmt: skip
"""The fields that each release of PEFT added to those of a LoRA, as it writes them when nobody set them."""


def fields(release: str) -> dict[str, Any]:
    """Return the fields that a release writes, with what stands in them by default."""
    found: dict[str, Any] = {}
    for name, added in RELEASES:
        found |= added
        if name == release:
            return found
    raise KeyError(release)


def lora(release: str, who: str = "", lacks: tuple[str, ...] = (), changes: Any = (), **about: Any) -> Shape:
    """Return a LoRA's shape: the fields of a release, some of them changed, others left out."""
    config = {name: value for name, value in fields(release).items() if name not in lacks} | dict(changes)
    return Shape(f"{who or 'PEFT'}, {release}", config, **about)


def mapped(model: str, library: str = "transformers", **more: Any) -> dict[str, Any]:
    """Return the ``auto_mapping`` of a model that was not loaded for a task."""
    parent = f"{library}.models.{model.lower()}.modeling_{model.lower()}"
    return {"auto_mapping": {"base_model_class": model, "parent_library": parent, **more}, "task_type": None}


ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
SEVEN = ["down_proj", "gate_proj", *ATTENTION, "up_proj"]
HEADS = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
UNSLOTH_PARTS = "(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)"
UNSLOTH_NAMES = "(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)"
UNSLOTH_REGEX = (
    rf"(?:.*?(?:language|text).*?{UNSLOTH_PARTS}.*?{UNSLOTH_NAMES}.*?)"
    rf"|(?:\bmodel\.layers\.[\d]{{1,}}\.{UNSLOTH_PARTS}\.(?:{UNSLOTH_NAMES}))"
)
QWEN_VL_REGEX = r"^(model.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))$"
EVERY_PATH = [
    f"model.layers.{layer}.{part}"
    for layer in (0, 1)
    for part in (
        *(f"self_attn.{name}" for name in ATTENTION),
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]

_OF_RELEASES = (
    lora("0.2", changes={"enable_lora": None, "merge_weights": False}),
    lora("0.3", changes={"enable_lora": None, "merge_weights": False, "target_modules": ATTENTION}),
    lora("0.2", "alpaca-lora with a float alpha", changes={
        "enable_lora": None, "merge_weights": False, "lora_alpha": 8.0, "target_modules": SEVEN,
        "modules_to_save": ["embed_tokens", "lm_head"],
    }),
    lora("0.3", "alpaca-lora", changes={"target_modules": ATTENTION}),
    lora("0.3", changes={"target_modules": SEVEN}),
    lora("0.3", "benchmark, not saved by PEFT", changes={"inference_mode": False}),
    lora("0.3", changes={"enable_lora": [True, False, True], "fan_in_fan_out": True, "merge_weights": False,
                         "target_modules": ["query_key_value"]},
         base="GPT-NeoX", refused="unsupported", says="PEFT 0.2"),
    lora("0.3", changes={"target_modules": ["query_key_value"]}, base="GPT-NeoX"),
    lora("0.4", changes={"target_modules": ["query_key_value"]}, base="BLOOM"),
    lora("0.5"),
    lora("0.5", changes={"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}, base="Falcon"),
    lora("0.5", changes={"target_modules": [*SEVEN, "embed_tokens", "lm_head"]}),
    lora("0.6"),
    lora("0.7", changes={"target_modules": [*SEVEN, "lm_head"]}, base="Mistral"),
    lora("0.8", changes={"target_modules": SEVEN}, base="Mistral"),
    lora("0.8", changes={"target_modules": ["k", "q", "v"], "task_type": "SEQ_2_SEQ_LM"}, base="T5"),
    lora("0.9", changes={"target_modules": SEVEN}),
    lora("0.9", changes={"target_modules": ["query_key_value"]}, base="GPT-NeoX"),
    lora("0.10", changes={"target_modules": ["o_proj", "q_proj", "v_proj"]}),
    lora("0.10", changes={"target_modules": [*SEVEN, "lm_head"]}),
    lora("0.10", changes={"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}, base="T5"),
    lora("0.10", changes={"target_modules": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]}, base="Phi-3"),
    lora("0.14", changes={"fan_in_fan_out": True, "target_modules": ["c_attn"]}, base="GPT-2"),
    lora("0.14", changes={"target_modules": ["query_key_value"]}, base="GPT-NeoX"),
    lora("0.15", changes={"target_modules": ATTENTION}),
    lora("0.15", changes={"target_modules": SEVEN}, base="Gemma 2"),
    lora("0.16", base="Mistral"),
    lora("0.17", changes={"target_modules": SEVEN}, base="Qwen2"),
    lora("0.17", changes={"target_modules": ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]}, base="Phi-3"),
    lora("0.18", base="Qwen3"),
    lora("0.18", changes={"target_modules": SEVEN}, base="Qwen2"),
    lora("0.18", changes={"target_modules": ["k", "o", "q", "v"], "task_type": "SEQ_2_SEQ_LM"}, base="T5"),
    lora("0.18", "heretic, rank 1", changes={"r": 1, "lora_alpha": 1, "target_modules": ["down_proj", "o_proj"]}, base="Mistral"),
    lora("0.19", changes={"modules_to_save": []}, base="Gemma 3, text"),
    lora("0.19", changes={"target_modules": SEVEN}, base="Gemma 3, text"),
    lora("0.19", changes={"target_modules": ["o_proj", "q_proj", "v_proj"]}),
    lora("0.19", changes={"modules_to_save": ["embed_tokens"], "target_modules": ATTENTION}),
    lora("0.20", changes={**mapped("LlamaModel"), "base_model_name_or_path": "", "target_modules": SEVEN}, trained="LlamaModel"),
    lora("0.20", "a development version", changes={"peft_version": "0.18.2.dev0@UNKNOWN"}),
    lora("0.18", "PEFT from source", changes={"peft_version": "0.18.0@a1b2c3d4e5f60718293a4b5c6d7e8f9012345678"}),
)  # fmt: skip

_OF_TRAINERS = (
    lora("0.10", "Unsloth", changes={"revision": "unsloth", "target_modules": SEVEN}),
    lora("0.14", "Unsloth, saved twice", changes={"target_modules": SEVEN + SEVEN}),
    lora("0.16", "Unsloth", changes={"auto_mapping": mapped("Llama", unsloth_fixed=True)["auto_mapping"], "target_modules": SEVEN}),
    lora("0.18", "Unsloth", changes={"auto_mapping": mapped("Qwen2", unsloth_fixed=True)["auto_mapping"], "target_modules": SEVEN}, base="Qwen2"),
    lora("0.15", "Unsloth", changes={"target_modules": UNSLOTH_REGEX}, base="Gemma 3, text"),
    lora("0.16", "Unsloth", changes={"target_modules": UNSLOTH_REGEX}, base="Gemma 3"),
    lora("0.10", "Unsloth on fused projections", changes={"target_modules": SEVEN}, base="Phi-3"),
    lora("0.10", "LLaMA-Factory", changes={"target_modules": ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]}, base="GPT-NeoX"),
    lora("0.10", "LLaMA-Factory, every path", changes={"target_modules": EVERY_PATH}),
    lora("0.10", "LLaMA-Factory", changes={"target_modules": SEVEN}, base="Qwen2.5-VL"),
    lora("0.18", "LLaMA-Factory, task of another kind", changes={"target_modules": [*SEVEN, "qkv"], "task_type": "SEQ_2_SEQ_LM"}, base="Qwen3-VL"),
    lora("0.19", "LibreQwen", changes={**mapped("Qwen3VLForConditionalGeneration"), "target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"}, base="Qwen3-VL"),
    lora("0.19", changes={"target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)$"}, base="LLaVA"),
    lora("0.15", base="Qwen2.5-VL"),
    lora("0.17", "ms-swift 3", changes={"target_modules": QWEN_VL_REGEX, "modules_to_save": []}, base="Qwen2.5-VL"),
    lora("0.7", "ms-swift 1", changes={"lora_dtype": None, "lorap_lr_ratio": None, "lorap_emb_lr": 1e-06}),
    lora("0.10", "ms-swift 2", changes={"lora_dtype": "fp32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06, "modules_to_save": []}),
    lora("0.2", "NeMo AutoModel", lacks=("fan_in_fan_out", "inference_mode", "lora_dropout", "modules_to_save"),
         changes={"use_dora": False, "target_modules": sorted(EVERY_PATH)}),
    lora("0.2", "NeMo AutoModel, a class without a task", lacks=("fan_in_fan_out", "inference_mode", "lora_dropout", "modules_to_save"),
         changes={"use_dora": True, "task_type": "QUESTION_ANS", "base_model_name_or_path": "N/A", "target_modules": sorted(EVERY_PATH)}),
    lora("0.2", "Levanter", changes={"enable_lora": None, "lora_dropout": 0.0, "target_modules": SEVEN}),
    lora("0.2", "Megatron-LM bridge", lacks=("fan_in_fan_out", "modules_to_save"), changes={"inference_mode": False, "target_modules": SEVEN}),
    lora("0.2", "written by hand", lacks=("fan_in_fan_out", "inference_mode", "modules_to_save"), changes={"target_modules": SEVEN}),
    lora("0.2", "a script's placeholder", lacks=("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_dropout", "modules_to_save", "task_type")),
    lora("0.18", "verl's model merger", changes={"lora_alpha": 0, "task_type": None, "base_model_name_or_path": None},
         built_with={"lora_alpha": 8}, refused="zero-scale", says="lora_alpha"),
    lora("0.17", "verl", changes={"task_type": "CAUSAL_LM", "auto_mapping": None, "target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"}),
    lora("0.7", "Qwen's own script", changes={"target_modules": ["c_attn", "c_proj", "w1", "w2"]}, base="GPT-2"),
    lora("0.19", "TRL", changes={"bias": "lora_only", "target_modules": ["down_proj", *ATTENTION, "up_proj"], "use_rslora": True}),
    lora("0.18", "Nemotron challenge", changes={"target_modules": ["down_proj", "in_proj", "k_proj", "o_proj", "out_proj", "q_proj", "up_proj", "v_proj"]}, base="Nemotron-H"),
    lora("0.2", "Nemotron, by hand", lacks=("bias", "fan_in_fan_out", "modules_to_save"), changes={"inference_mode": False, "target_modules": SEVEN}, base="Nemotron-H"),
    lora("0.19", changes={"exclude_modules": ".*(audio_tower|vision_tower|embed_vision|embed_audio).*", "target_modules": SEVEN}, base="Gemma 3"),
    lora("0.16", "SmolVLM", changes={"target_modules": [*SEVEN, "fc1", "fc2", "out_proj", "proj"]}, base="LLaVA"),
)  # fmt: skip

_OF_HEADS = (
    lora("0.14", changes={**HEADS, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj"]}, base="GPT-2, classifier"),
    lora("0.10", "TRL reward", changes={**HEADS, "fan_in_fan_out": True, "target_modules": ["attn.c_attn", "attn.c_proj"]}, base="GPT-2, classifier"),
    lora("0.19", "TRL reward", changes={**HEADS, "fan_in_fan_out": True, "target_modules": ["attn.c_attn", "attn.c_proj"]}, base="GPT-2, padded", trained="GPT2ForSequenceClassification"),
    lora("0.14", changes={**HEADS, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "q_proj", "v_proj"]}, base="GPT-2, classifier"),
    lora("0.15", changes={**HEADS, "target_modules": ["key", "query", "value"]}, base="RoBERTa, classifier"),
    lora("0.16", changes={**HEADS, "target_modules": ["query", "value"]}, base="BERT, classifier"),
    lora("0.17", changes={**HEADS, "target_modules": ["query", "value"]}, base="BERT", trained="BertForSequenceClassification",
         refused="no-head", says="bert.pooler.dense.weight"),
    lora("0.20", changes={**HEADS, "modules_to_save": ["classifier", "classifier", "score"], "target_modules": ["query", "value"]}, base="BERT, classifier"),
    lora("0.16", changes={**HEADS, "target_modules": ["q_lin", "v_lin"]}, base="DistilBERT, classifier"),
    lora("0.8", changes={"target_modules": ["k_lin", "lin1", "lin2", "q_lin", "v_lin"], "task_type": "SEQ_CLS"}, base="DistilBERT, classifier",
         built_with={"task_type": None}),
    lora("0.10", "CodonBERT", changes={"target_modules": ["query", "value"], "task_type": "TOKEN_CLS", "use_rslora": True}, base="BERT, tokens", built_with={"task_type": None}),
    lora("0.19", changes={**HEADS, "target_modules": ATTENTION, "task_type": "TOKEN_CLS"}, base="Llama, tokens"),
    lora("0.15", changes={**mapped("RobertaModel"), "target_modules": ["query", "value"]}, base="RoBERTa"),
    lora("0.15", "sentence embeddings", changes={"target_modules": ATTENTION, "task_type": "FEATURE_EXTRACTION"}, base="Qwen2", trained="Qwen2Model"),
    lora("0.14.1", changes={**mapped("WhisperForConditionalGeneration")}, base="Whisper"),
    lora("0.17", changes={**mapped("SiglipModel"), "modules_to_save": ["vision_model.head", "text_model.head"], "target_modules": ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]}, base="SigLIP"),
    lora("0.17", changes={**mapped("SiglipModel"), "modules_to_save": ["logit_scale", "logit_bias"], "target_modules": ATTENTION}, base="SigLIP"),
    lora("0.10", changes={**mapped("BlipForConditionalGeneration"), "target_modules": ["mlp.fc1", "mlp.fc2", "output.dense", "self.key", "self.query", "self.value", "self_attn.projection", "self_attn.qkv"]}, base="BLIP"),
    lora("0.14", changes={**mapped("CLIPTextModel"), "target_modules": ["k_proj", "out_proj", "q_proj", "to_k", "to_out.0", "to_q", "to_v", "v_proj"]}, base="CLIP text"),
    lora("0.5", "Phi with its own code", changes={"target_modules": ["fc1", "fc2", "dense"]}, base="Phi"),
)  # fmt: skip

_OF_VALUES = (
    lora("0.19", changes={"fan_in_fan_out": None}),
    lora("0.19", changes={"loftq_config": None, "megatron_core": None, "rank_pattern": None, "alpha_pattern": None}, built_with={"rank_pattern": {}, "alpha_pattern": {}}),
    lora("0.19", changes={"layers_to_transform": 1}),
    lora("0.19", changes={"layers_to_transform": [0], "layers_pattern": "layers"}),
    lora("0.19", changes={"layers_to_transform": [1], "layers_pattern": ["layers"]}),
    lora("0.19", changes={"layers_to_transform": [1], "layers_pattern": "h", "target_modules": ["c_attn"], "fan_in_fan_out": True}, base="GPT-2"),
    lora("0.19", changes={"layers_to_transform": [], "layers_pattern": []}),
    lora("0.19", changes={"layers_to_transform": None, "layers_pattern": ""}),
    lora("0.19", changes={"layer_replication": []}),
    lora("0.19", changes={"exclude_modules": []}),
    lora("0.19", changes={"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    lora("0.19", changes={"exclude_modules": "", "target_modules": ATTENTION}),
    lora("0.19", changes={"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 16}}),
    lora("0.19", changes={"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}, "use_rslora": True}),
    lora("0.19", changes={"init_lora_weights": "gaussian"}),
    lora("0.19", changes={"init_lora_weights": "orthogonal"}),
    lora("0.19", changes={"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99, "use_label_mask": True, "label_mask_value": -100, "whiten": False, "adjust_scaling_factors": True}}, built_with={"init_lora_weights": True}),
    lora("0.19", changes={"init_lora_weights": False}),
    lora("0.19", changes={"init_lora_weights": None}),
    lora("0.19", changes={"init_lora_weights": "pissa"}, options={"base_is": "original"}),
    lora("0.19", changes={"init_lora_weights": "pissa_niter_16"}, refused="base-is", says="PiSSA", built_with={"init_lora_weights": True}),
    lora("0.19", changes={"init_lora_weights": "olora"}, options={"base_is": "original"}),
    lora("0.19", changes={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}, refused="base-is", says="LoftQ", built_with={"init_lora_weights": True}),
    lora("0.15", changes={"init_lora_weights": "corda", "corda_config": {"cache_file": None, "covariance_file": None, "corda_method": "ipm", "verbose": False, "use_float16_for_covariance": False, "prune_temporary_fields": True}}, refused="base-is", says="CorDA", built_with={"init_lora_weights": True, "corda_config": None}),
    lora("0.19", changes={"use_dora": True, "target_modules": SEVEN}),
    lora("0.19", changes={"lora_bias": True}, base="Llama, biased"),
    lora("0.19", changes={"bias": "all"}, base="Llama, biased"),
    lora("0.19", changes={"bias": "lora_only"}, base="Llama, biased"),
    lora("0.19", changes={**HEADS, "bias": "all", "target_modules": ["c_attn"]}, base="GPT-2, classifier"),
    lora("0.19", changes={"trainable_token_indices": [3, 17, 94]}),
    lora("0.19", changes={"trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [3, 17]}}),
    lora("0.19", changes={"target_parameters": []}),
    lora("0.19", changes={"target_modules": [], "lora_dropout": 0.0, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}, base="gpt-oss"),
    lora("0.19", changes={"target_modules": ATTENTION, "lora_dropout": 0.0, "target_parameters": ["7.mlp.experts.gate_up_proj", "1.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"]}, base="gpt-oss"),
    lora("0.19", changes={"target_modules": SEVEN}, base="gpt-oss"),
    lora("0.19", changes={"target_modules": ["x_proj", "embeddings", "in_proj", "out_proj"]}, base="Mamba"),
    lora("0.19", changes={"target_modules": "q_proj|v_proj"}, refused="unexpected-tensor", says="q_proj", built_with={"target_modules": ["q_proj", "v_proj"]}),
    lora("0.19", changes={"target_modules": "all-linear"}),
    lora("0.19", changes={"target_modules": "ALL-LINEAR"}),
    lora("0.19", changes={"target_modules": None}),
    lora("0.14.1", changes={"inference_mode": False, "target_modules": None, "use_dora": True}),
    lora("0.19", changes={"use_qalora": True}, refused="unsupported", says="QA-LoRA", built_with={"use_qalora": False}),
    lora("0.19", changes={"alora_invocation_tokens": [5, 6]}, refused="unsupported", says="aLoRA"),
    lora("0.14", "PEFT from source", changes={"runtime_config": {"ephemeral_gpu_offload": True}}),
    lora("0.2", changes={"enable_lora": None, "merge_weights": True}),
    lora("0.19", changes={"task_type": "lm"}, built_with={"task_type": None}),
    lora("0.19", changes={"base_model_name_or_path": None, "task_type": None}),
    lora("0.19", changes={"r": 4.0, "lora_alpha": 8.0}, built_with={"r": 4}),
    lora("0.19", changes={"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}, base="Gemma 3, text"),
    lora("0.19", changes={"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o_proj", "down_proj"], "target_modules_bd_b": ["q_proj", "v_proj", "k_proj", "up_proj", "gate_proj"], "match_strict": True}, "target_modules": ["down_proj", "gate_proj", "up_proj"]}),
    lora("0.20", changes={"kasa_config": {"beta": 0.0001, "gamma": 0.001}}),
    lora("0.20", changes={"init_lora_weights": "mica"}),
    lora("0.20", changes={"velora_config": {"num_groups": 8, "scale": 1.0, "init_type": "batch_average_once"}}),
)  # fmt: skip

SHAPES: tuple[Shape, ...] = (*_OF_RELEASES, *_OF_TRAINERS, *_OF_HEADS, *_OF_VALUES)
