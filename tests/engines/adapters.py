"""The one list of adapters that engines are asked to serve themselves: as they are, and converted for the engine.

What an engine makes of each as it is stands here too. The tests ask the engine, and then whether ``lora-merge inspect``
says the same. Everything here is data and imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.engines.families import (
    ALL_LINEAR,
    ATTENTION,
    CASES,
    GATED,
    LLAMA,
    LLAMA_TIED,
    QWEN2,
    QWEN3,
    STACKED,
    SWIFT,
    Model,
)

Server = Literal["vllm", "lmdeploy"]
SERVERS: tuple[Server, ...] = ("vllm", "lmdeploy")
"""Engines that serve adapters on a CPU. LMDeploy's TurboMind serves none at all."""

VLLM_RANKS = (16, 32, 64, 128)
"""What ``max_lora_rank`` may be, of what is wanted here; the first is its default."""

Deed = Literal["right", "wrong", "refused"]


@dataclass(frozen=True, slots=True)
class Makes:
    """What an engine makes of an adapter as it is."""

    deed: Deed
    says: str = ""
    """A part of its error."""


RIGHT = Makes("right")
WRONG = Makes("wrong")
"""It says nothing, and computes something else."""


def _refused(says: str) -> Makes:
    return Makes("refused", says)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A model and an adapter for it."""

    model: Model
    adapter: str
    """What a user calls the adapter."""

    lora: Mapping[str, Any] = field(hash=False)
    """What the config is told, beside rank and alpha where it does not say them."""

    vllm: Makes = RIGHT
    """With ``max_lora_rank`` as it is by default."""

    lmdeploy: Makes = RIGHT
    options: tuple[str, ...] = ()
    """Of the conversion, beside ``--for`` and ``--base``."""

    base_is: tuple[str, ...] = ()
    """What the command has to be told of the base, whatever it does with the adapter."""

    lost_on: tuple[Server, ...] = ()
    """Engines that no conversion helps with."""

    config: str = "LoraConfig"
    """PEFT's class."""

    edit: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What its config says instead of what PEFT writes."""

    is_pickle: bool = False
    is_rounded: bool = False
    """Its tensors are stored in bfloat16."""

    saved_by: Literal["0.14", "0.21"] = "0.14"
    """The release of PEFT whose fields its config has."""

    true_rank: int = 0
    """The rank of B A, where that is lower than r; 0 where it is r."""

    is_lossy: bool = False
    """The conversion drops a part of it: then the converted adapter in PEFT is what an engine has to agree with."""

    asked: tuple[Server, ...] = SERVERS
    """Engines that it is shown to."""

    unseen: tuple[Server, ...] = ()
    """Engines whose own reason to refuse it is in a kernel for GPUs, and cannot be seen here."""

    @property
    def name(self) -> str:
        return f"{self.model.name}, {self.adapter}"

    def makes(self, server: Server) -> Makes:
        """Return what an engine makes of it as it is."""
        return self.vllm if server == "vllm" else self.lmdeploy


# What LMDeploy says.
ONE_LETTER = _refused("KeyError")  # it iterates over the characters of the regex, and then lacks the modules
OTHER_SHAPE = _refused("must match the size of tensor b")
NO_TEXT = _refused("AssertionError")
NO_SUCH = _refused("KeyError")
NO_TARGETS = _refused("TypeError: 'NoneType' object is not iterable")

# What vLLM says.
OVER_16 = _refused("LoRA rank 32 is greater than max_lora_rank 16")
NO_DORA = _refused("vLLM does not yet support DoRA")
NO_WHOLE = _refused("modules_to_save being either None")
NO_BIAS = _refused("Adapter bias is not supported")
NO_B_BIAS = _refused("does not support LoRA bias")
NO_TOKENS = _refused("unsupported LoRA weight")
NO_EMBEDDING = _refused("expected target modules")
NO_PISSA = _refused("does not support init_lora_weights='pissa'")

PATTERNS = {"rank_pattern": {"q_proj": 3, "down_proj": 16}, "alpha_pattern": {"o_proj": 40, "up_proj": 5}}
SECOND_LAYER = (
    rf"^(model\.layers\.1\.)(?!.*(lm_head|output|emb|wte|shared)).*\.({'|'.join(ATTENTION + GATED)})$"
)
PATHS = [f"model.layers.{n}.{path}" for n in (0, 1) for path in ("self_attn.q_proj", "mlp.down_proj")]
Q_PATHS = [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
LARGE = {**ALL_LINEAR, "r": 32, "lora_alpha": 32}
ONLY_LMDEPLOY: Mapping[str, Any] = {"asked": ("lmdeploy",)}
"""Mixtures of experts: with LoRA switched on, vLLM runs them on GPUs only."""

MODELS = {case.model.name: case.model for case in CASES}
LANGUAGE = rf"^(model\.language_model(?=\.).*\.({'|'.join(ATTENTION + GATED)}))$"
"""A regex of ms-swift's for a model that sees."""

FULL_RANK = ("--to-lora", "--rank", "128")
"""A Llama's matrices here have no more."""

ADAPTERS: tuple[Adapted, ...] = (
    Adapted(LLAMA, "LoRA", ALL_LINEAR),
    Adapted(LLAMA, "LoRA saved by PEFT 0.21", ALL_LINEAR, lmdeploy=NO_TARGETS, saved_by="0.21"),
    Adapted(LLAMA, "regex of ms-swift", {"target_modules": SWIFT}, lmdeploy=ONE_LETTER),
    Adapted(LLAMA, "rsLoRA", {**ALL_LINEAR, "use_rslora": True}, lmdeploy=WRONG),
    Adapted(
        LLAMA, "rsLoRA in bfloat16", {**ALL_LINEAR, "use_rslora": True}, lmdeploy=WRONG, is_rounded=True
    ),
    Adapted(LLAMA, "ranks and alphas by patterns", {**ALL_LINEAR, **PATTERNS}, lmdeploy=OTHER_SHAPE),
    Adapted(LLAMA, "alphas by a pattern", {**ALL_LINEAR, "alpha_pattern": {"o_proj": 40}}, lmdeploy=WRONG),
    Adapted(LLAMA, "last layer only", {**ALL_LINEAR, "layers_to_transform": [1]}, lmdeploy=WRONG),
    Adapted(LLAMA, "first layer only", {**ALL_LINEAR, "layers_to_transform": [0]}, lmdeploy=WRONG),
    Adapted(LLAMA, "without k_proj", {**ALL_LINEAR, "exclude_modules": ["k_proj"]}, lmdeploy=WRONG),
    Adapted(LLAMA, "whole paths", {"target_modules": PATHS}, lmdeploy=NO_TEXT),
    Adapted(LLAMA, "whole paths of q_proj", {"target_modules": Q_PATHS}),
    Adapted(
        LLAMA,
        "all-linear",
        {"target_modules": "all-linear"},
        lmdeploy=ONE_LETTER,
        edit={"target_modules": "all-linear"},
    ),
    Adapted(LLAMA, "ends of paths", {"target_modules": ["self_attn.q_proj", "mlp.down_proj"]}),
    Adapted(LLAMA, "without lm_head, which is no target", {**ALL_LINEAR, "exclude_modules": ["lm_head"]}),
    Adapted(LLAMA, "a pickle", ALL_LINEAR, is_pickle=True),
    Adapted(LLAMA, "gaussian init", {**ALL_LINEAR, "init_lora_weights": "gaussian"}),
    Adapted(LLAMA, "q and up only", {"target_modules": ["q_proj", "up_proj"]}),
    Adapted(
        LLAMA,
        "regex of a layer, rsLoRA, patterns, rank 32 to 16",
        {**PATTERNS, "target_modules": SECOND_LAYER, "use_rslora": True, "r": 32},
        vllm=OVER_16,
        lmdeploy=NO_TEXT,
        options=("--rank", "16"),
        true_rank=16,
    ),
    Adapted(LLAMA, "rank 32", LARGE, vllm=OVER_16),
    Adapted(LLAMA, "rank 32 that is 16", LARGE, vllm=OVER_16, options=("--rank", "16"), true_rank=16),
    Adapted(LLAMA, "rank 32 to 16", LARGE, vllm=OVER_16, options=("--rank", "16"), is_lossy=True),
    Adapted(
        LLAMA,
        "rank 32, but 8 by a pattern everywhere",
        {"target_modules": ["q_proj"], "r": 32, "rank_pattern": {"q_proj": 8}},
        vllm=OVER_16,
        lmdeploy=_refused("must match the size of tensor b"),
    ),
    Adapted(LLAMA, "rank 6", {**ALL_LINEAR, "r": 6}),
    Adapted(LLAMA, "rank 6 padded to 8", {**ALL_LINEAR, "r": 6}, options=("--pad-rank", "8")),
    Adapted(
        LLAMA,
        "rank 24",
        {**ALL_LINEAR, "r": 24},
        vllm=_refused("LoRA rank 24 is greater than max_lora_rank 16"),
        unseen=("lmdeploy",),
    ),
    Adapted(
        LLAMA,
        "embedding and head",
        {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
        lmdeploy=NO_TEXT,
        lost_on=("lmdeploy",),
    ),
    Adapted(
        LLAMA,
        "DoRA",
        {**ALL_LINEAR, "use_dora": True},
        vllm=NO_DORA,
        lmdeploy=NO_TEXT,
        options=FULL_RANK,
    ),
    Adapted(
        LLAMA,
        "modules_to_save",
        {**ALL_LINEAR, "modules_to_save": ["lm_head"]},
        vllm=NO_WHOLE,
        lmdeploy=NO_TEXT,
        options=FULL_RANK,
        lost_on=("lmdeploy",),
    ),
    Adapted(
        LLAMA,
        "trained tokens",
        {**ALL_LINEAR, "trainable_token_indices": [5, 17, 94]},
        vllm=NO_TOKENS,
        lmdeploy=NO_TARGETS,
        options=FULL_RANK,
        lost_on=("lmdeploy",),
        saved_by="0.21",
    ),
    Adapted(
        LLAMA,
        "biases, of which there are none",
        {**ALL_LINEAR, "bias": "lora_only"},
        vllm=NO_BIAS,
    ),
    Adapted(
        LLAMA,
        "PiSSA",
        {**ALL_LINEAR, "init_lora_weights": "pissa"},
        vllm=NO_PISSA,
        lmdeploy=WRONG,
        options=("--to-lora", "--rank", "16"),
        base_is=("--base-is", "original"),
    ),
    Adapted(
        LLAMA,
        "AdaLoRA",
        {**ALL_LINEAR, "init_r": 8, "target_r": 4, "total_step": 10, "lora_alpha": 16},
        vllm=NO_TOKENS,
        lmdeploy=NO_TARGETS,
        config="AdaLoraConfig",
        saved_by="0.21",
    ),
    Adapted(LLAMA_TIED, "LoRA", ALL_LINEAR),
    Adapted(
        LLAMA_TIED,
        "embedding",
        {"target_modules": [*ATTENTION, "embed_tokens"]},
        lmdeploy=NO_TEXT,
        lost_on=("lmdeploy",),
    ),
    Adapted(QWEN2, "LoRA", ALL_LINEAR),
    Adapted(QWEN2, "rsLoRA on some layers", {**ALL_LINEAR, "use_rslora": True, "layers_to_transform": [1]}, lmdeploy=WRONG),
    Adapted(
        QWEN2,
        "head",
        {"target_modules": [*ATTENTION, "lm_head"]},
        vllm=NO_EMBEDDING,
        lmdeploy=NO_TEXT,
        lost_on=SERVERS,
    ),
    Adapted(
        QWEN2,
        "biases",
        {**ALL_LINEAR, "bias": "lora_only"},
        vllm=NO_BIAS,
        lmdeploy=NO_TEXT,
        lost_on=SERVERS,
    ),
    Adapted(
        QWEN2,
        "biases of lora_B",
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True},
        vllm=NO_B_BIAS,
        lmdeploy=NO_TEXT,
        lost_on=SERVERS,
    ),
    Adapted(QWEN3, "LoRA", ALL_LINEAR),
    Adapted(QWEN3, "regex of ms-swift", {"target_modules": SWIFT}, lmdeploy=ONE_LETTER),
    Adapted(
        MODELS["Phi-3"],
        "rsLoRA on some layers",
        {
            "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
            "use_rslora": True,
            "layers_to_transform": [1],
        },
        lmdeploy=WRONG,
    ),
    Adapted(MODELS["Gemma 3, text"], "regex of ms-swift", {"target_modules": SWIFT}, lmdeploy=ONE_LETTER),
    Adapted(
        MODELS["Qwen2.5-VL"],
        "LoRA of the language model",
        {"target_modules": ALL_LINEAR["target_modules"], "exclude_modules": r".*visual.*"},
        lmdeploy=ONE_LETTER,
    ),
    Adapted(MODELS["Qwen2.5-VL"], "regex of ms-swift", {"target_modules": LANGUAGE}, lmdeploy=ONE_LETTER),
    Adapted(MODELS["Mixtral"], "o_proj", {"target_modules": ["o_proj"]}, **ONLY_LMDEPLOY),
    Adapted(
        MODELS["Mixtral"],
        "LoRA",
        {"target_modules": list(ATTENTION)},
        lmdeploy=NO_SUCH,
        lost_on=("lmdeploy",),
        **ONLY_LMDEPLOY,
    ),
    Adapted(MODELS["Qwen3-MoE"], "LoRA", {"target_modules": list(ATTENTION)}, **ONLY_LMDEPLOY),
    Adapted(
        MODELS["Qwen3-MoE"],
        "LoRA of experts",
        {"target_modules": ["q_proj"], "target_parameters": list(STACKED)},
        lmdeploy=NO_TARGETS,
        lost_on=("lmdeploy",),
        saved_by="0.21",
        **ONLY_LMDEPLOY,
    ),
    Adapted(
        MODELS["DeepSeek-V3"],
        "q_a_proj and o_proj",
        {"target_modules": ["q_a_proj", "o_proj"]},
        **ONLY_LMDEPLOY,
    ),
    Adapted(
        MODELS["DeepSeek-V3"],
        "q_b_proj",
        {"target_modules": ["q_b_proj"]},
        lmdeploy=WRONG,
        lost_on=("lmdeploy",),
        **ONLY_LMDEPLOY,
    ),
    Adapted(
        MODELS["DeepSeek-V3"],
        "kv_b_proj",
        {"target_modules": ["kv_b_proj"]},
        lmdeploy=WRONG,
        lost_on=("lmdeploy",),
        **ONLY_LMDEPLOY,
    ),
)  # fmt: skip
