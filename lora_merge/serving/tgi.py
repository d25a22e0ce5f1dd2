"""Text Generation Inference: its LoRA comes from LoRAX; it adds rsLoRA and lacks LoRA on the head."""

from __future__ import annotations

from lora_merge.serving.rules import Engine, Families, Ranks, Rule

_RUN = "text-generation-inference 3.3.7, server/text_generation_server; its loader was run on the CPU"
_READ = "text-generation-inference 3.3.7, server/text_generation_server, read"

_LAYER = r"model\.layers\.\d+\."
_ATTENTION = rf"{_LAYER}self_attn\.([qkvo]|qkv)_proj"
_DENSE = rf"{_ATTENTION}|{_LAYER}mlp\.(gate|up|down)_proj"

_FAMILIES = Families(
    key="model_type",
    served={
        **dict.fromkeys(
            ("llama", "phi3", "granite", "baichuan", "mistral", "qwen2", "gemma2", "gemma3_text"), _DENSE
        ),
        "phimoe": _ATTENTION,
        "starcoder2": rf"{_ATTENTION}|{_LAYER}mlp\.(gate_proj|up_proj|down_proj|c_fc|c_proj)",
    },
    unknown=frozenset(
        {"gemma3", "qwen2_vl", "qwen2_5_vl", "mllama", "idefics2", "idefics3", "paligemma", "llava_next"}
    ),
    is_complete=True,
    lacking="ignores",
    effect="wrong",
    source=f"{_READ}: models/__init__.py:1869, utils/adapter.py:232, and models/custom_modeling: which layers are MultiAdapter ones",
)
"""By ``model_type``. The layers of other types have no LoRA (Gemma, Cohere, Phi, Mixtral, GPT-2), or the table of layers
cannot be built and TGI does not start (GPT-NeoX, Falcon, models that run in transformers)."""

TGI = Engine(
    name="TGI",
    version="3.3.7",
    ranks=Ranks(
        most=128,
        allowed=(16, 32, 64, 128),
        by_padding=True,
        source=f"{_RUN}: adapters/lora.py:245",
        otherwise="pads other ranks internally, and computes the scale from the padded rank after the first kind of layer",
    ),
    families=_FAMILIES,
    always=("every-layer",),
    rules=(
        Rule(
            "kind",
            "refused",
            "does not start with any other method than LoRA",
            f"{_RUN}: adapters/lora.py:103",
            ("to-lora",),
        ),
        Rule("format", "refused", "reads PEFT's files", f"{_READ}: utils/adapter.py:201", ("rewrite",)),
        Rule(
            "pickle",
            "refused",
            "reads safetensors only, from a directory",
            f"{_READ}: utils/adapter.py:201",
            ("rewrite",),
        ),
        Rule(
            "alphas-differ",
            "wrong",
            "uses one α for all modules",
            f"{_READ}: adapters/lora.py:245",
            ("bake-scale",),
        ),
        Rule(
            "ranks-differ",
            "wrong",
            "uses one rank for the scale, or fails to stack the tensors of a layer type",
            f"{_RUN}: adapters/lora.py:147, 245",
            ("pad-rank",),
        ),
        Rule(
            "some-layers",
            "wrong",
            "ignores a module in all layers if one layer lacks it",
            f"{_RUN}: adapters/lora.py:235",
            ("every-layer",),
        ),
        Rule("dora", "wrong", "ignores the magnitudes", f"{_READ}: adapters/lora.py:90", ("to-lora",)),
        Rule("modules-to-save", "wrong", "ignores whole modules", f"{_READ}: adapters/lora.py:89"),
        Rule(
            "saved-embeddings",
            "wrong",
            "ignores saved embeddings, which is correct only if they equal the base's",
            f"{_READ}: adapters/lora.py:89",
            ("without-copies",),
            by_base=True,
        ),
        Rule("bias", "wrong", "ignores trained biases", f"{_READ}: adapters/lora.py:89"),
        Rule("lora-bias", "wrong", "ignores the bias of lora_B", f"{_READ}: adapters/lora.py:89"),
        Rule("tokens", "wrong", "ignores trained tokens", f"{_READ}: adapters/lora.py:89"),
        Rule("embedding", "wrong", "ignores LoRA on the input embedding", f"{_READ}: adapters/lora.py:89"),
        Rule(
            "head",
            "wrong",
            "ignores LoRA on the output embedding, with a warning",
            f"{_READ}: models/__init__.py:1869",
        ),
        Rule("target-parameters", "wrong", "ignores LoRA on experts", f"{_READ}: utils/adapter.py:259"),
        Rule("experts", "wrong", "ignores LoRA on experts", f"{_READ}: utils/adapter.py:259"),
        Rule("convolution", "wrong", "ignores LoRA on convolutions", f"{_READ}: adapters/lora.py:89"),
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
            f"{_READ}: utils/adapter.py",
            ("to-lora",),
        ),
    ),
)
