"""Published models as their files have them: names, dtypes and shapes of all tensors, configuration, and number of files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from hollows.tensors import Stored

Targets = Literal["attention", "all"]
TARGETS: tuple[Targets, ...] = ("attention", "all")
"""What adapters change: the attention, or all linear layers and experts."""


@dataclass(frozen=True, slots=True)
class Module:
    """A module that an adapter changes."""

    name: str
    shape: tuple[int, int]
    """[out, in] of its weight; of one expert, where it is a stack."""

    n_experts: int = 1
    """How many matrices its factors have side by side."""


class Model(Protocol):
    """A model as it is published, or fewer layers of it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def storage(self) -> str:
        """How its weights are stored, in a few words."""

    @property
    def files(self) -> tuple[str, ...]:
        """Names of its weight files."""

    def config(self) -> dict[str, Any]:
        """Return its ``config.json``."""

    def tensors(self) -> Iterator[Stored]:
        """Yield its tensors in the order of its layers."""

    def small(self, _: Stored, /) -> Iterable[bytes]:
        """Return the bytes of a tensor that a plan reads; nothing of all others."""

    def modules(self, targets: Targets) -> Iterator[Module]:
        """Yield the modules of an adapter."""

    def adapter_fields(self, targets: Targets) -> dict[str, Any]:
        """Return what ``adapter_config.json`` says about targets."""

    def slice(self) -> Model:
        """Return one with layers of the same sizes, but few of them, and few experts and tokens."""


def numbered(n: int, first: int, last: int, width: int) -> tuple[str, ...]:
    """Return names of weight files."""
    return tuple(f"model-{k:05}-of-{last:0{width}}.safetensors" for k in range(first, first + n))


Q_RANK, KV_RANK, NOPE, ROPE, V = 1536, 512, 128, 64, 128
BLOCK, GROUP = 128, 32
"""Of a scale: rows and columns in FP8, columns in INT4."""

ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

FP8: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
INT4: Mapping[str, Any] = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": [
        "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    ],
    "config_groups": {
        "group_0": {
            "input_activations": None, "output_activations": None, "targets": ["Linear"],
            "weights": {
                "actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
            },
        }
    },
}  # fmt: skip

_LATENT_CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "initializer_range": 0.02,
    "moe_layer_freq": 1, "n_shared_experts": 1, "norm_topk_prob": True, "num_experts_per_tok": 8,
    "kv_lora_rank": KV_RANK, "q_lora_rank": Q_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE,
    "v_head_dim": V, "rms_norm_eps": 1e-06, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Latent:
    """A model with DeepSeek-V3's layers: attention of low ranks, and experts from some layer on."""

    name: str
    storage: Literal["FP8", "INT4 experts"]
    files: tuple[str, ...]
    fields: Mapping[str, Any]
    """Of the configuration, beside the sizes and those of all such models."""

    n_experts: int
    n_dense: int
    heads: int
    vocab: int
    n_layers: int = 61
    n_further: int = 0
    """Layers that predict further tokens."""

    hidden: int = 7168
    wide: int = 18_432
    narrow: int = 2048

    def config(self) -> dict[str, Any]:
        """See `Model`."""
        sizes = {
            "hidden_size": self.hidden, "intermediate_size": self.wide, "moe_intermediate_size": self.narrow,
            "vocab_size": self.vocab, "num_hidden_layers": self.n_layers, "first_k_dense_replace": self.n_dense,
            "n_routed_experts": self.n_experts, "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": self.n_further,
        }  # fmt: skip
        stored = FP8 if self.storage == "FP8" else INT4
        return {**_LATENT_CONFIG, **self.fields, **sizes, "quantization_config": stored}

    def tensors(self) -> Iterator[Stored]:
        """See `Model`."""
        ends = (self.vocab, self.hidden)
        yield Stored("model.embed_tokens.weight", "BF16", ends)
        for n in range(self.n_layers + self.n_further):
            layer = f"model.layers.{n}"
            for module in (*self._attention(layer), *self._mlps(layer, n)):
                yield from self._weight(module)
            for norm, size in (
                ("input_layernorm", self.hidden), ("post_attention_layernorm", self.hidden),
                ("self_attn.q_a_layernorm", Q_RANK), ("self_attn.kv_a_layernorm", KV_RANK),
            ):  # fmt: skip
                yield Stored(f"{layer}.{norm}.weight", "BF16", (size,))
            if n >= self.n_dense:
                yield Stored(f"{layer}.mlp.gate.weight", "BF16", (self.n_experts, self.hidden))
                yield Stored(f"{layer}.mlp.gate.e_score_correction_bias", "F32", (self.n_experts,))
            if n >= self.n_layers:
                yield Stored(f"{layer}.embed_tokens.weight", "BF16", ends)
                yield Stored(f"{layer}.eh_proj.weight", "BF16", (self.hidden, 2 * self.hidden))
                for norm in ("enorm", "hnorm", "shared_head.norm"):
                    yield Stored(f"{layer}.{norm}.weight", "BF16", (self.hidden,))
                yield Stored(f"{layer}.shared_head.head.weight", "BF16", ends)
        yield Stored("model.norm.weight", "BF16", (self.hidden,))
        yield Stored("lm_head.weight", "BF16", ends)

    def _weight(self, module: Module) -> Iterator[Stored]:
        name, (n_out, n_in) = module.name, module.shape
        if self.storage == "FP8":
            yield Stored(f"{name}.weight", "F8_E4M3", module.shape)
            yield Stored(f"{name}.weight_scale_inv", "F32", (-(-n_out // BLOCK), -(-n_in // BLOCK)))
        elif ".experts." in name:
            yield Stored(f"{name}.weight_packed", "I32", (n_out, n_in // 8))
            yield Stored(f"{name}.weight_scale", "BF16", (n_out, n_in // GROUP))
            yield Stored(f"{name}.weight_shape", "I32", (2,))
        else:
            yield Stored(f"{name}.weight", "BF16", module.shape)

    def small(self, tensor: Stored) -> Iterable[bytes]:
        """See `Model`: the shape that INT4 states of each weight."""
        if tensor.name.endswith(".weight_shape"):
            sizes = (self.hidden, self.narrow) if ".down_proj." in tensor.name else (self.narrow, self.hidden)
            yield b"".join(size.to_bytes(4, "little") for size in sizes)

    def _attention(self, layer: str) -> Iterator[Module]:
        sizes = (
            (Q_RANK, self.hidden), (self.heads * (NOPE + ROPE), Q_RANK), (KV_RANK + ROPE, self.hidden),
            (self.heads * (NOPE + V), KV_RANK), (self.hidden, self.heads * V),
        )  # fmt: skip
        for name, shape in zip(ATTENTION, sizes, strict=True):
            yield Module(f"{layer}.self_attn.{name}", shape)

    def _mlps(self, layer: str, n: int) -> Iterator[Module]:
        if n < self.n_dense:
            yield from self._mlp(f"{layer}.mlp", self.wide)
            return
        yield from self._mlp(f"{layer}.mlp.shared_experts", self.narrow)
        for expert in range(self.n_experts):
            yield from self._mlp(f"{layer}.mlp.experts.{expert}", self.narrow)

    def _mlp(self, path: str, width: int) -> Iterator[Module]:
        for name in MLP:
            turned = name == "down_proj"
            yield Module(f"{path}.{name}", (self.hidden, width) if turned else (width, self.hidden))

    def modules(self, targets: Targets) -> Iterator[Module]:
        """See `Model`: trainers do not load the layers that predict further tokens."""
        for n in range(self.n_layers):
            layer = f"model.layers.{n}"
            yield from self._attention(layer)
            if targets == "all":
                yield from self._mlps(layer, n)

    def adapter_fields(self, targets: Targets) -> dict[str, Any]:
        """See `Model`."""
        return {"target_modules": sorted(ATTENTION if targets == "attention" else ATTENTION + MLP)}

    def slice(self) -> Latent:
        """See `Model`: a layer with four experts."""
        files = numbered(3, 1, 3, 6)
        return replace(self, files=files, n_experts=4, n_dense=0, n_layers=1, n_further=0, vocab=2048)


@dataclass(frozen=True, slots=True)
class GptOss:
    """gpt-oss: the experts of a layer are two stacks in MXFP4."""

    name: str = "gpt-oss-120b"
    storage: str = "MXFP4 experts"
    files: tuple[str, ...] = numbered(15, 0, 14, 5)
    n_layers: int = 36
    n_experts: int = 128
    vocab: int = 201_088
    hidden: int = 2880
    heads: int = 64
    kv_heads: int = 8
    width: int = 64
    """Of a head."""

    def config(self) -> dict[str, Any]:
        """See `Model`."""
        dense = ("layers.*.self_attn", "layers.*.mlp.router", "embed_tokens")
        return {
            "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
            "attention_dropout": 0.0, "eos_token_id": min(200_002, self.vocab - 1), "pad_token_id": min(199_999, self.vocab - 1), "experts_per_token": 4,
            "head_dim": self.width, "hidden_act": "silu", "hidden_size": self.hidden, "initial_context_length": 4096,
            "initializer_range": 0.02, "intermediate_size": self.hidden, "max_position_embeddings": 131072,
            "layer_types": [("sliding_attention", "full_attention")[n % 2] for n in range(self.n_layers)],
            "num_attention_heads": self.heads, "num_experts_per_tok": 4, "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.kv_heads, "num_local_experts": self.n_experts, "output_router_logits": False,
            "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
            "rope_scaling": {
                "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                "rope_type": "yarn", "truncate": False,
            },
            "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": self.vocab,
            "quantization_config": {
                "quant_method": "mxfp4", "modules_to_not_convert": [*(f"model.{one}" for one in dense), "lm_head"],
            },
        }  # fmt: skip

    def tensors(self) -> Iterator[Stored]:
        """See `Model`."""
        yield Stored("model.embed_tokens.weight", "BF16", (self.vocab, self.hidden))
        for n in range(self.n_layers):
            layer = f"model.layers.{n}"
            for module in self._attention(layer):
                yield Stored(f"{module.name}.weight", "BF16", module.shape)
                yield Stored(f"{module.name}.bias", "BF16", module.shape[:1])
            yield Stored(f"{layer}.self_attn.sinks", "BF16", (self.heads,))
            yield Stored(f"{layer}.mlp.router.weight", "BF16", (self.n_experts, self.hidden))
            yield Stored(f"{layer}.mlp.router.bias", "BF16", (self.n_experts,))
            for name, n_out in (("gate_up_proj", 2 * self.hidden), ("down_proj", self.hidden)):
                stack, groups = f"{layer}.mlp.experts.{name}", (self.n_experts, n_out, self.hidden // GROUP)
                yield Stored(f"{stack}_blocks", "U8", (*groups, GROUP // 2))
                yield Stored(f"{stack}_scales", "U8", groups)
                yield Stored(f"{stack}_bias", "BF16", (self.n_experts, n_out))
            for norm in ("input", "post_attention"):
                yield Stored(f"{layer}.{norm}_layernorm.weight", "BF16", (self.hidden,))
        yield Stored("model.norm.weight", "BF16", (self.hidden,))
        yield Stored("lm_head.weight", "BF16", (self.vocab, self.hidden))

    def small(self, _: Stored) -> Iterable[bytes]:
        """See `Model`."""
        return ()

    def _attention(self, layer: str) -> Iterator[Module]:
        for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
            yield Module(f"{layer}.self_attn.{name}_proj", (heads * self.width, self.hidden))
        yield Module(f"{layer}.self_attn.o_proj", (self.hidden, self.heads * self.width))

    def modules(self, targets: Targets) -> Iterator[Module]:
        """See `Model`: PEFT names the first parameter of a module that has two ``base_layer``."""
        for n in range(self.n_layers):
            layer = f"model.layers.{n}"
            yield from self._attention(layer)
            if targets == "all":
                stack = f"{layer}.mlp.experts"
                yield Module(f"{stack}.base_layer", (2 * self.hidden, self.hidden), self.n_experts)
                yield Module(stack, (self.hidden, self.hidden), self.n_experts)

    def adapter_fields(self, targets: Targets) -> dict[str, Any]:
        """See `Model`."""
        fields: dict[str, Any] = {"target_modules": ["k_proj", "o_proj", "q_proj", "v_proj"]}
        if targets == "all":
            fields["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return fields

    def slice(self) -> GptOss:
        """See `Model`: two layers of six experts."""
        return replace(self, files=numbered(3, 0, 2, 5), n_layers=2, n_experts=6, vocab=4096)


def _yarn(factor: float) -> dict[str, Any]:
    return {
        "beta_fast": 32, "beta_slow": 1, "factor": factor, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    }  # fmt: skip


_DEEPSEEK = {
    "model_type": "deepseek_v3", "max_position_embeddings": 163_840, "n_group": 8, "topk_group": 4,
    "rope_scaling": _yarn(40), "rope_theta": 10_000, "routed_scaling_factor": 2.5,
}  # fmt: skip
_KIMI = {
    "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "rope_theta": 50_000.0, "routed_scaling_factor": 2.827,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}  # fmt: skip
_K2 = {**_KIMI, "max_position_embeddings": 131_072, "rope_scaling": _yarn(32)}
_THINKING = {**_KIMI, "max_position_embeddings": 262_144, "rope_scaling": _yarn(64)}

_BY_LAYER = tuple(f"model-{n}-of-61.safetensors" for n in range(1, 62))

MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Latent("DeepSeek-V3", "FP8", numbered(163, 1, 163, 6), _DEEPSEEK, 256, 3, 128, 129_280, n_further=1),
        Latent("Kimi-K2", "FP8", _BY_LAYER, _K2, 384, 1, 64, 163_840),
        Latent("Kimi-K2-Thinking", "INT4 experts", numbered(62, 1, 62, 6), _THINKING, 384, 1, 64, 163_840),
        GptOss(),
    )
}
"""By name."""
