"""LoRAX: a few ranks without padding, every layer or none, and nothing but LoRA on linear layers."""

from __future__ import annotations

from lora_merge.serving.rules import Engine, Families, Ranks, Rule

_RUN = "lorax a7394ba3 (2026-05), server/lorax_server; its loader was run on the CPU"
_READ = "lorax a7394ba3 (2026-05), server/lorax_server, read"

_LAYER = r"model\.layers\.\d+\."
_BLOCK = r"transformer\.h\.\d+\."
_ATTENTION = rf"{_LAYER}self_attn\.[qkvo]_proj"
_DENSE = rf"{_ATTENTION}|{_LAYER}mlp\.(gate|up|down)_proj"

_FAMILIES = Families(
    key="model_type",
    served={
        **dict.fromkeys(
            ("llama", "mistral", "qwen2", "gemma", "gemma2", "cohere", "granite", "solar"), _DENSE
        ),
        "mixtral": _ATTENTION,
        "phi": rf"{_LAYER}self_attn\.([qkv]_proj|dense)|{_LAYER}mlp\.fc[12]",
        "phi-msft": rf"{_LAYER}self_attn\.([qkv]_proj|dense)|{_LAYER}mlp\.fc[12]",
        "phi3": rf"{_LAYER}self_attn\.(qkv|o)_proj|{_LAYER}mlp\.(gate_up|down)_proj",
        "gpt2": rf"{_BLOCK}attn\.c_(attn|proj)|{_BLOCK}mlp\.c_(fc|proj)",
        "qwen": rf"{_BLOCK}attn\.c_(attn|proj)|{_BLOCK}mlp\.(w1|w2|c_proj)",
        "bloom": rf"{_BLOCK}self_attention\.(query_key_value|dense)|{_BLOCK}mlp\.dense_(h_to_4h|4h_to_h)",
        "dbrx": r"transformer\.blocks\.\d+\.norm_attn_norm\.attn\.(Wqkv|out_proj)",
    },
    unknown=frozenset({"llava", "llava_next", "mllama", "xlm-roberta"}),
    is_complete=True,
    lacking="ignores",
    effect="wrong",
    source=f"{_READ}: models/__init__.py:96, models/flash_*.py adapter_target_to_layer, models/model.py:236",
)
"""By ``model_type``. Other types are not supported, or their class has ``supports_adapter_loading`` False: Falcon,
GPT-NeoX, StarCoder, MPT, OPT, T5, BERT."""

LORAX = Engine(
    name="LoRAX",
    version="a7394ba3 (2026-05)",
    ranks=Ranks(
        most=128,
        allowed=(16, 32, 64, 128),
        by_padding=True,
        source=f"{_RUN}: adapters/lora.py:184, utils/punica.py:46",
        otherwise="pads other ranks internally, and computes the scale from the padded rank after the first kind of layer",
    ),
    families=_FAMILIES,
    # A module that one layer lacks would be left out of all layers.
    always=("every-layer",),
    rules=(
        Rule(
            "kind",
            "wrong",
            "ignores the method, finds no factors and serves the base",
            f"{_READ}: adapters/lora.py:44",
            ("to-lora",),
        ),
        Rule("format", "refused", "reads PEFT's files", f"{_READ}: utils/weights.py", ("rewrite",)),
        Rule(
            "rslora",
            "wrong",
            "multiplies by α/r: its PEFT 0.4 does not support rsLoRA",
            f"{_READ}: adapters/lora.py:83",
            ("bake-scale",),
        ),
        Rule(
            "alphas-differ",
            "wrong",
            "uses one α for all modules",
            f"{_READ}: adapters/lora.py:184",
            ("bake-scale",),
        ),
        Rule(
            "ranks-differ",
            "wrong",
            "uses one rank for the scale, or fails to stack the tensors of a layer type",
            f"{_RUN}: adapters/lora.py:104, 184",
            ("pad-rank",),
        ),
        Rule(
            "some-layers",
            "wrong",
            "ignores a module in all layers if one layer lacks it",
            f"{_RUN}: adapters/lora.py:174",
            ("every-layer",),
        ),
        Rule("dora", "wrong", "ignores the magnitudes", f"{_READ}: adapters/lora.py:45", ("to-lora",)),
        Rule(
            "modules-to-save",
            "wrong",
            "ignores whole modules",
            f"{_READ}: adapters/lora.py:44",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "wrong",
            "ignores saved embeddings, which is correct only if they equal the base's",
            f"{_READ}: adapters/lora.py:44",
            ("without-copies",),
            by_base=True,
        ),
        Rule("bias", "wrong", "ignores trained biases", f"{_READ}: adapters/lora.py:44"),
        Rule("lora-bias", "wrong", "ignores the bias of lora_B", f"{_READ}: adapters/lora.py:44"),
        Rule("tokens", "wrong", "ignores trained tokens", f"{_READ}: adapters/lora.py:44"),
        Rule("embedding", "wrong", "ignores LoRA on the input embedding", f"{_READ}: adapters/lora.py:44"),
        Rule(
            "head",
            "wrong",
            "ignores LoRA on the output embedding",
            f"{_READ}: models/flash_*.py",
            except_for=frozenset({"llama", "mistral", "qwen2", "cohere", "granite", "phi", "dbrx"}),
        ),
        Rule("target-parameters", "wrong", "ignores LoRA on experts", f"{_READ}: models/flash_mixtral.py:21"),
        Rule("experts", "wrong", "ignores LoRA on experts", f"{_READ}: models/flash_mixtral.py:21"),
        Rule("convolution", "wrong", "ignores LoRA on convolutions", f"{_READ}: adapters/lora.py:44"),
        Rule(
            "initial",
            "wrong",
            "uses the published base, without the change of the initialisation",
            f"{_READ}: adapters/lora.py",
            ("to-lora",),
        ),
        Rule("replicated", "wrong", "does not support repeated layers", f"{_READ}: adapters/lora.py"),
        Rule(
            "beside",
            "wrong",
            "reads only the adapter's own weight file",
            f"{_READ}: utils/weights.py",
            ("to-lora",),
        ),
    ),
)
