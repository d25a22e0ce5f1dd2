"""The one list of every kind of adapter that is merged: what the parity suite runs, and the tables of docs/supported.md.

Everything here is data. `Kind.config` builds the PEFT config, and only that imports PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Group = Literal["LoRA family", "AdaLoRA", "other PEFT methods", "whole parameters"]
Setting = Literal["plain", "resized", "residual", "masked"]

HALVES = ("bfloat16", "float16")

MODULES: Mapping[str, tuple[str, ...]] = {
    "llama": ("q_proj", "v_proj", "down_proj"),
    "llama_tied": ("q_proj", "v_proj", "down_proj"),
    "llama_biased": ("q_proj", "v_proj", "down_proj"),
    "llama_classifier": ("q_proj", "v_proj", "down_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "gpt2_untied": ("c_attn", "c_fc"),
    "resnet": ("convolution",),
    "wav2vec2": ("conv_layers.0.conv", "conv_layers.1.conv"),
    "videomae": ("projection",),
    "siglip": ("head.attention",),
}
"""What is adapted in a model of `tests.parity.building`, unless the kind says something else."""


@dataclass(frozen=True, slots=True)
class Nested:
    """A config inside a config, by its class's name."""

    config_class: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> Any:
        """Return the instance."""
        import peft
        from peft.tuners import lora

        found = getattr(peft, self.config_class, None) or getattr(lora, self.config_class)
        return found(**self.fields)


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of adapter, and how one is made."""

    name: str
    """What a user would call it."""

    group: Group
    """The table of docs/supported.md that it is in."""

    peft_type: str
    """``peft_type`` of its ``adapter_config.json``."""

    config_class: str
    """The class in PEFT that configures it."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """What is handed to that class; `MODULES` fills in ``target_modules``."""

    models: tuple[str, ...] = ("llama",)
    """Models of `tests.parity.building` that it is tried on."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Dtypes of the base. float32 compares outputs, the others bits."""

    options: tuple[str, ...] = ()
    """What a user has to say on the command line."""

    scale: float = 0.1
    """Standard deviation of what is added to every trainable value: enough to change the output visibly."""

    setting: Setting = "plain"
    """``resized``: trained on a larger vocabulary. ``residual``: trained on the base that its initialization
    left, which is saved as the base. ``masked``: AdaLoRA after a part of the ranks was taken away."""

    save: Mapping[str, Any] = field(default_factory=dict)
    """What ``save_pretrained`` is told."""

    peft_merge_is_right: bool = True
    """PEFT's merge computes what its forward pass computes, so our bits must be its bits."""

    needs: str = ""
    """A package that PEFT imports for it."""

    notes: str = ""
    """What to know before reading its numbers."""

    def config(self, model: str) -> Any:
        """Return PEFT's config of this kind for one model."""
        import peft

        fields = {
            name: value.build() if isinstance(value, Nested) else value for name, value in self.fields.items()
        }
        untargeted = {"target_modules", "target_parameters"}.isdisjoint(fields)
        if untargeted:
            fields["target_modules"] = list(MODULES[model])
        return getattr(peft, self.config_class)(**fields)


def _lora(name: str, *models: str, **fields: Any) -> dict[str, Any]:
    """Return what all kinds of LoRA have in common."""
    return {
        "name": name,
        "peft_type": "LORA",
        "config_class": "LoraConfig",
        "models": models or ("llama",),
        "fields": {"r": 4, "lora_alpha": 6, **fields},
    }


def _family(name: str, *models: str, **fields: Any) -> dict[str, Any]:
    """Return what the kinds of the LoRA family have in common."""
    return {**_lora(name, *models, **fields), "group": "LoRA family", "dtypes": ("float32", *HALVES)}


def _variant(name: str, *models: str, **fields: Any) -> dict[str, Any]:
    """Return what the kinds of the LoRA family have in common that are rounded like a plain LoRA."""
    return {**_lora(name, *models, **fields), "group": "LoRA family"}


def _whole(name: str, *models: str, **fields: Any) -> dict[str, Any]:
    """Return what a LoRA with parameters trained as a whole has in common with others."""
    return {**_lora(name, *models, **fields), "group": "whole parameters"}


def _other(name: str, peft_type: str, config_class: str, *models: str, **fields: Any) -> dict[str, Any]:
    """Return what the other methods have in common."""
    return {
        "name": name,
        "group": "other PEFT methods",
        "peft_type": peft_type,
        "config_class": config_class,
        "models": models or ("llama",),
        "fields": fields,
    }


ALL_CONVOLUTIONS = ("resnet", "wav2vec2", "videomae")
BOTH_EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FULL_EMBEDDINGS = {"save_embedding_layers": True}

_LORA: tuple[Kind, ...] = (
    Kind(**_family("LoRA")),
    Kind(**_family("rsLoRA", use_rslora=True)),
    Kind(
        **_variant(
            "LoRA with rank_pattern and alpha_pattern",
            rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 7},
            alpha_pattern={r"layers\.\d+\.self_attn\.v_proj": 1},
        )
    ),
    Kind(**_family("LoRA on Conv1D", "gpt2")),
    Kind(**_family("LoRA on an embedding", "llama", target_modules=["embed_tokens"])),
    Kind(**_family("LoRA on an embedding of GPT-2", "gpt2_untied", target_modules=["wte"])),
    Kind(**_variant("LoRA on an untied output embedding", "llama", target_modules=["q_proj", "lm_head"])),
    Kind(
        **{
            **_lora("LoRA on a tied embedding", "llama_tied", target_modules=["q_proj", "embed_tokens"]),
            "group": "LoRA family",
            "dtypes": ("float32",),
        },
        peft_merge_is_right=False,
        notes="the two ends differ afterwards, and are untied; PEFT merges into what they share",
    ),
    Kind(
        **{
            **_lora("LoRA on a tied output embedding", "llama_tied", target_modules=["q_proj", "lm_head"]),
            "group": "LoRA family",
            "dtypes": ("float32",),
        },
        peft_merge_is_right=False,
        notes="the two ends differ afterwards, and are untied; PEFT merges into what they share",
    ),
    Kind(**_family("LoRA on Conv1d", "wav2vec2")),
    Kind(**_family("LoRA on Conv2d", "resnet")),
    Kind(**_variant("LoRA on Conv3d", "videomae")),
    Kind(
        **_variant("LoRA on nn.MultiheadAttention", "siglip"),
        notes="PEFT applies the delta of out_proj twice, in its forward pass as in its merge",
    ),
    Kind(
        **_variant(
            "LoRA on stacked experts (target_parameters), one parameter",
            "qwen3_moe",
            "granitemoe",
            "gpt_oss",
            target_modules=[],
            target_parameters=["experts.down_proj"],
        ),
        notes="[experts, out, in] in Qwen3-MoE and Granite MoE, [experts, in, out] in gpt-oss",
    ),
    Kind(
        **_variant(
            "LoRA on stacked experts (target_parameters), two parameters",
            "qwen3_moe",
            "granitemoe",
            "gpt_oss",
            target_modules=[],
            target_parameters=BOTH_EXPERTS,
        )
    ),
    Kind(
        **_variant(
            "LoRA on stacked experts beside linear layers",
            "qwen3_moe",
            target_modules=["q_proj"],
            target_parameters=BOTH_EXPERTS,
            rank_pattern={"experts.down_proj": 2},
        )
    ),
    Kind(
        **_variant(
            "LoRA on a matrix by its parameter's name (target_parameters)",
            "llama",
            target_modules=[],
            target_parameters=["q_proj.weight", "v_proj.weight"],
        )
    ),
    Kind(
        **_variant(
            "LoRA on a router by its parameter's name (target_parameters)",
            "gpt_oss",
            target_modules=[],
            target_parameters=["router.weight"],
        )
    ),
    Kind(**_family("DoRA on a linear layer", "llama", use_dora=True)),
    Kind(**_variant("DoRA on Conv1D", "gpt2", use_dora=True)),
    Kind(**_variant("DoRA on an embedding", "llama", use_dora=True, target_modules=["embed_tokens"])),
    Kind(**_variant("DoRA on Conv1d", "wav2vec2", use_dora=True)),
    Kind(**_variant("DoRA on Conv2d", "resnet", use_dora=True)),
    Kind(**_variant("DoRA on Conv3d", "videomae", use_dora=True)),
    Kind(**_variant("LoRA with a bias (lora_bias)", "llama_biased", lora_bias=True)),
    Kind(
        **_variant(
            "BD-LoRA",
            use_bdlora=Nested(
                "BdLoraConfig",
                {
                    "target_modules_bd_a": ["down_proj"],
                    "target_modules_bd_b": ["q_proj", "v_proj"],
                    "nblocks": 2,
                },
            ),
        )
    ),
    Kind(**_variant("KaSA", kasa_config=Nested("KasaConfig")), notes="the base is truncated by an SVD"),
    Kind(
        **_variant(
            "KaSA beside trained tokens", kasa_config=Nested("KasaConfig"), trainable_token_indices=[3, 5]
        )
    ),
    Kind(**_variant("VeLoRA", velora_config=Nested("VeloraConfig", {"num_groups": 4}))),
    Kind(**_variant("MonteCLoRA", monteclora_config=Nested("MontecloraConfig"))),
    Kind(**_variant("MiCA", init_lora_weights="mica")),
    Kind(
        **_variant("PiSSA on the original base", init_lora_weights="pissa"),
        options=("--base-is", "original"),
        notes="PEFT decomposes the base again when it loads the adapter",
    ),
    Kind(
        **_variant(
            "PiSSA on the original base, beside trained tokens",
            init_lora_weights="pissa",
            trainable_token_indices=[3, 5],
        ),
        options=("--base-is", "original"),
    ),
    Kind(
        **_variant("OLoRA on the original base", init_lora_weights="olora"),
        options=("--base-is", "original"),
        notes="PEFT decomposes the base again when it loads the adapter",
    ),
    Kind(
        **_variant("PiSSA on the residual base", init_lora_weights="pissa"),
        options=("--base-is", "residual"),
        setting="residual",
        notes="PEFT would decompose the residual: it is told that this is a plain LoRA",
    ),
    Kind(
        **_variant("OLoRA on the residual base", init_lora_weights="olora"),
        options=("--base-is", "residual"),
        setting="residual",
        notes="PEFT would decompose the residual: it is told that this is a plain LoRA",
    ),
)

_ADALORA_FIELDS = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 12}
_ADALORA: tuple[Kind, ...] = (
    Kind(
        "AdaLoRA",
        "AdaLoRA",
        "ADALORA",
        "AdaLoraConfig",
        _ADALORA_FIELDS,
        ("llama", "gpt2", "resnet"),
        scale=0.3,
    ),
    Kind(
        "AdaLoRA after its ranks were reduced",
        "AdaLoRA",
        "ADALORA",
        "AdaLoraConfig",
        _ADALORA_FIELDS,
        scale=0.3,
        setting="masked",
        dtypes=("float32",),
        notes="one module has rank 0; on a bfloat16 base PEFT rounds the factors when it resizes them, we do not",
    ),
)

_OTHERS: tuple[Kind, ...] = (
    Kind(**_other("LoHa", "LOHA", "LoHaConfig", "llama", *ALL_CONVOLUTIONS[:2], r=4, alpha=8), scale=0.2),
    Kind(
        **_other(
            "LoHa with an effective decomposition of convolutions",
            "LOHA",
            "LoHaConfig",
            "resnet",
            r=4,
            alpha=8,
            use_effective_conv2d=True,
        ),
        scale=0.3,
    ),
    Kind(**_other("LoKr", "LOKR", "LoKrConfig", "llama", *ALL_CONVOLUTIONS[:2], r=4, alpha=8)),
    Kind(
        **_other(
            "LoKr, both factors decomposed",
            "LOKR",
            "LoKrConfig",
            r=2,
            alpha=8,
            decompose_both=True,
            decompose_factor=4,
        ),
        scale=0.2,
    ),
    Kind(
        **_other(
            "LoKr with an effective decomposition of convolutions",
            "LOKR",
            "LoKrConfig",
            "resnet",
            r=4,
            alpha=8,
            decompose_factor=4,
            use_effective_conv2d=True,
        ),
        scale=0.2,
    ),
    Kind(**_other("IA³", "IA3", "IA3Config", "llama_biased", feedforward_modules=["down_proj"])),
    Kind(**_other("IA³ on Conv1D", "IA3", "IA3Config", "gpt2", feedforward_modules=["c_fc"])),
    Kind(**_other("IA³ on a convolution", "IA3", "IA3Config", "resnet", feedforward_modules=[])),
    Kind(**_other("OFT", "OFT", "OFTConfig", "llama", oft_block_size=16)),
    Kind(
        **_other(
            "OFT on a 1×1 convolution",
            "OFT",
            "OFTConfig",
            "resnet",
            oft_block_size=8,
            target_modules=["layer.0.convolution", "layer.2.convolution"],
        ),
        notes="on a larger kernel the forward pass folds overlapping patches: no kernel computes the same",
    ),
    Kind(
        **_other(
            "OFT on an embedding", "OFT", "OFTConfig", oft_block_size=16, target_modules=["embed_tokens"]
        )
    ),
    Kind(**_other("BOFT", "BOFT", "BOFTConfig", boft_block_size=4, boft_n_butterfly_factor=2)),
    Kind(
        **_other(
            "BOFT on Conv2d",
            "BOFT",
            "BOFTConfig",
            "resnet",
            boft_block_size=4,
            boft_n_butterfly_factor=1,
            target_modules=["layer.1.convolution", "layer.2.convolution"],
        )
    ),
    Kind(**_other("HRA", "HRA", "HRAConfig", "llama", "resnet", r=4)),
    Kind(**_other("RoAd", "ROAD", "RoadConfig", "llama_biased", group_size=32)),
    Kind(**_other("MiSS", "MISS", "MissConfig", r=16)),
    Kind(
        **_other(
            "MiSS, bat", "MISS", "MissConfig", r=16, target_modules=["q_proj", "o_proj"], init_weights="bat"
        )
    ),
    Kind(**_other("C3A", "C3A", "C3AConfig", block_size=16), scale=0.5),
    Kind(**_other("FourierFT", "FOURIERFT", "FourierFTConfig", "llama", "gpt2", n_frequency=50), scale=1.0),
    Kind(**_other("WaveFT", "WAVEFT", "WaveFTConfig", "llama", n_frequency=50), scale=0.1),
    Kind(**_other("SHiRA", "SHIRA", "ShiraConfig", r=4, random_seed=1)),
    Kind(**_other("GraLoRA", "GRALORA", "GraloraConfig", "llama", "gpt2", r=8)),
    Kind(**_other("DeLoRA", "DELORA", "DeloraConfig", r=4)),
    Kind(**_other("HiRA", "HIRA", "HiraConfig", "llama", "gpt2", "resnet", r=4), scale=0.3),
    Kind(**_other("DEFT", "DEFT", "DeftConfig", "llama", "gpt2", r=4)),
    Kind(**_other("GLoRA", "GLORA", "GloraConfig", "llama_biased", r=4)),
    Kind(**_other("PEANuT", "PEANUT", "PeanutConfig", r=4)),
    Kind(**_other("SuperTuning", "SUPERTUNING", "SupertuningConfig", sparsity=0.9)),
    Kind(**_other("VeRA", "VERA", "VeraConfig", "llama", "gpt2", r=8), scale=0.3),
    Kind(
        **_other("VeRA, projections not saved", "VERA", "VeraConfig", r=8, save_projection=False), scale=0.3
    ),
    Kind(**_other("PVeRA", "PVERA", "PveraConfig", r=8), scale=0.3),
    Kind(**_other("RandLoRA", "RANDLORA", "RandLoraConfig", r=8), scale=0.3),
    Kind(
        **_other("RandLoRA, projections not saved", "RANDLORA", "RandLoraConfig", r=8, save_projection=False),
        scale=0.3,
    ),
    Kind(**_other("VB-LoRA", "VBLORA", "VBLoRAConfig", r=4, num_vectors=16, vector_length=16), scale=0.5),
    Kind(
        **_other(
            "VB-LoRA, top-k weights saved",
            "VBLORA",
            "VBLoRAConfig",
            r=4,
            num_vectors=16,
            vector_length=16,
            save_only_topk_weights=True,
        ),
        scale=0.5,
    ),
    Kind(**_other("Uni-LoRA", "UNILORA", "UniLoraConfig", r=4, theta_d_length=64), scale=0.5),
    Kind(**_other("TinyLoRA", "TINYLORA", "TinyLoraConfig", r=2, u=8), scale=0.5),
    Kind(
        **_other(
            "TinyLoRA, shared vectors, projections not saved",
            "TINYLORA",
            "TinyLoraConfig",
            r=2,
            u=8,
            weight_tying=0.5,
            save_projection=False,
        ),
        scale=0.5,
    ),
    Kind(**_other("FRoD", "FROD", "FrodConfig", progressbar=False)),
    Kind(**_other("BEFT", "BEFT", "BeftConfig", "llama_biased"), scale=0.3),
    Kind(**_other("OSF", "OSF", "OSFConfig", effective_rank=8), options=("--allow-svd",)),
    Kind(**_other("PSOFT", "PSOFT", "PsoftConfig", r=8), options=("--allow-svd",)),
    Kind(
        **_other("AdaMSS", "ADAMSS", "AdamssConfig", r=16, num_subspaces=3, subspace_rank=1),
        options=("--allow-svd",),
        needs="sklearn",
    ),
)

_WHOLE: tuple[Kind, ...] = (
    Kind(**_whole("modules_to_save", "llama", "llama_tied", modules_to_save=["lm_head"])),
    Kind(
        **_whole("modules_to_save of norms", modules_to_save=["norm"]),
        notes="PEFT compares the end of the path without a dot: input_layernorm is meant too",
    ),
    Kind(**_whole("modules_to_save of an embedding", modules_to_save=["embed_tokens"])),
    Kind(
        **_whole("modules_to_save of a classifier's head", "llama_classifier", task_type="SEQ_CLS"),
        notes="PEFT adds the head to modules_to_save by itself",
    ),
    Kind(**_whole("trainable_token_indices", trainable_token_indices=[1, 17, 80])),
    Kind(
        **_whole(
            "trainable_token_indices, layer by layer",
            trainable_token_indices={"embed_tokens": [1, 17, 80], "lm_head": [5, 33]},
        )
    ),
    Kind(
        name="trainable tokens alone",
        group="whole parameters",
        peft_type="TRAINABLE_TOKENS",
        config_class="TrainableTokensConfig",
        fields={"token_indices": [1, 17, 80], "target_modules": ["embed_tokens"]},
    ),
    Kind(
        name="LayerNorm tuning",
        group="whole parameters",
        peft_type="LN_TUNING",
        config_class="LNTuningConfig",
        fields={"target_modules": ["input_layernorm", "post_attention_layernorm", "norm"]},
    ),
    Kind(**_whole('bias="all"', "llama_biased", "gpt2", bias="all")),
    Kind(**_whole('bias="lora_only"', "llama_biased", bias="lora_only")),
    Kind(
        **_whole(
            "a whole embedding saved beside its LoRA", target_modules=["q_proj", "embed_tokens", "lm_head"]
        ),
        notes="PEFT's default when an embedding is a target",
    ),
    Kind(
        **_whole("a larger vocabulary"),
        setting="resized",
        save=FULL_EMBEDDINGS,
        notes="the base keeps its own size; the adapter brings both matrices and the tokenizer",
    ),
    Kind(
        **_whole("a larger vocabulary with LoRA on it", target_modules=["q_proj", "embed_tokens", "lm_head"]),
        setting="resized",
        save=FULL_EMBEDDINGS,
    ),
    Kind(
        **_whole("a larger vocabulary of a tied model", "llama_tied"),
        setting="resized",
        save=FULL_EMBEDDINGS,
    ),
)

KINDS: tuple[Kind, ...] = (*_LORA, *_ADALORA, *_OTHERS, *_WHOLE)


class Algebra(NamedTuple):
    """What tells the arithmetic of adapters apart."""

    peft_type: str
    model: str
    """Whose layers are of another kind than a llama's; empty for linear layers."""

    n_stacks: int
    """Stacks of experts that it changes."""

    dora: bool


OTHER_LAYERS = frozenset(
    {"gpt2", "llama_tied", "resnet", "wav2vec2", "videomae", "siglip", "qwen3_moe", "gpt_oss"}
)


def algebra(kind: Kind, model: str, *_: object) -> Algebra:
    """Return what is to be computed for a kind of adapters on a model."""
    linear = model not in OTHER_LAYERS
    n_stacks = len(kind.fields.get("target_parameters", ()))
    return Algebra(kind.peft_type, "" if linear else model, n_stacks, bool(kind.fields.get("use_dora")))


def peft_type(kind: Kind, *_: object) -> str:
    """Return the type of a kind of adapters."""
    return kind.peft_type
