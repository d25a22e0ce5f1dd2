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
    lacking="leaves out",
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
        otherwise="pads another rank inside and computes the scale from the padded one, after the first kind of layer",
    ),
    families=_FAMILIES,
    # A module that one layer lacks would be left out of all layers.
    always=("every-layer",),
    rules=(
        Rule(
            "kind",
            "wrong",
            "ignores the type, finds no factors and serves the base",
            f"{_READ}: adapters/lora.py:44",
            ("to-lora",),
        ),
        Rule("format", "refused", "reads PEFT's files", f"{_READ}: utils/weights.py", ("rewrite",)),
        Rule(
            "rslora",
            "wrong",
            "multiplies by α/r: its PEFT 0.4 knows no rsLoRA",
            f"{_READ}: adapters/lora.py:83",
            ("bake-scale",),
        ),
        Rule(
            "alphas-differ",
            "wrong",
            "takes one α for all modules",
            f"{_READ}: adapters/lora.py:184",
            ("bake-scale",),
        ),
        Rule(
            "ranks-differ",
            "wrong",
            "takes one rank for the scale, or fails to stack the tensors of a layer type",
            f"{_RUN}: adapters/lora.py:104, 184",
            ("pad-rank",),
        ),
        Rule(
            "some-layers",
            "wrong",
            "leaves a module out of all layers when one layer lacks it",
            f"{_RUN}: adapters/lora.py:174",
            ("every-layer",),
        ),
        Rule("dora", "wrong", "leaves the magnitudes out", f"{_READ}: adapters/lora.py:45", ("to-lora",)),
        Rule(
            "modules-to-save",
            "wrong",
            "leaves whole modules out",
            f"{_READ}: adapters/lora.py:44",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "wrong",
            "leaves embeddings that are saved along out, which is right for copies only",
            f"{_READ}: adapters/lora.py:44",
            ("without-copies",),
            by_base=True,
        ),
        Rule("bias", "wrong", "leaves trained biases out", f"{_READ}: adapters/lora.py:44"),
        Rule("lora-bias", "wrong", "leaves the bias of lora_B out", f"{_READ}: adapters/lora.py:44"),
        Rule("tokens", "wrong", "leaves trained tokens out", f"{_READ}: adapters/lora.py:44"),
        Rule("embedding", "wrong", "leaves LoRA on the input embedding out", f"{_READ}: adapters/lora.py:44"),
        Rule(
            "head",
            "wrong",
            "leaves LoRA on the output embedding out",
            f"{_READ}: models/flash_*.py",
            except_for=frozenset({"llama", "mistral", "qwen2", "cohere", "granite", "phi", "dbrx"}),
        ),
        Rule(
            "target-parameters", "wrong", "leaves LoRA on experts out", f"{_READ}: models/flash_mixtral.py:21"
        ),
        Rule("experts", "wrong", "leaves LoRA on experts out", f"{_READ}: models/flash_mixtral.py:21"),
        Rule("convolution", "wrong", "leaves LoRA on convolutions out", f"{_READ}: adapters/lora.py:44"),
        Rule(
            "initial",
            "wrong",
            "takes the factors as they are, on the base as published",
            f"{_READ}: adapters/lora.py",
            ("to-lora",),
        ),
        Rule("replicated", "wrong", "knows no repeated layers", f"{_READ}: adapters/lora.py"),
        Rule(
            "beside", "wrong", "reads the adapter's own file only", f"{_READ}: utils/weights.py", ("to-lora",)
        ),
    ),
)
