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
    lacking="leaves out",
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
        otherwise="pads another rank inside and computes the scale from the padded one, after the first kind of layer",
    ),
    families=_FAMILIES,
    always=("every-layer",),
    rules=(
        Rule(
            "kind",
            "refused",
            "does not start: its configuration has to be LoRA's",
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
            "takes one α for all modules",
            f"{_READ}: adapters/lora.py:245",
            ("bake-scale",),
        ),
        Rule(
            "ranks-differ",
            "wrong",
            "takes one rank for the scale, or fails to stack the tensors of a layer type",
            f"{_RUN}: adapters/lora.py:147, 245",
            ("pad-rank",),
        ),
        Rule(
            "some-layers",
            "wrong",
            "leaves a module out of all layers when one layer lacks it",
            f"{_RUN}: adapters/lora.py:235",
            ("every-layer",),
        ),
        Rule("dora", "wrong", "leaves the magnitudes out", f"{_READ}: adapters/lora.py:90", ("to-lora",)),
        Rule("modules-to-save", "wrong", "leaves whole modules out", f"{_READ}: adapters/lora.py:89"),
        Rule(
            "saved-embeddings",
            "wrong",
            "leaves embeddings that are saved along out, which is right for copies only",
            f"{_READ}: adapters/lora.py:89",
            ("without-copies",),
            by_base=True,
        ),
        Rule("bias", "wrong", "leaves trained biases out", f"{_READ}: adapters/lora.py:89"),
        Rule("lora-bias", "wrong", "leaves the bias of lora_B out", f"{_READ}: adapters/lora.py:89"),
        Rule("tokens", "wrong", "leaves trained tokens out", f"{_READ}: adapters/lora.py:89"),
        Rule("embedding", "wrong", "leaves LoRA on the input embedding out", f"{_READ}: adapters/lora.py:89"),
        Rule(
            "head",
            "wrong",
            "leaves LoRA on the output embedding out, with a warning",
            f"{_READ}: models/__init__.py:1869",
        ),
        Rule("target-parameters", "wrong", "leaves LoRA on experts out", f"{_READ}: utils/adapter.py:259"),
        Rule("experts", "wrong", "leaves LoRA on experts out", f"{_READ}: utils/adapter.py:259"),
        Rule("convolution", "wrong", "leaves LoRA on convolutions out", f"{_READ}: adapters/lora.py:89"),
        Rule(
            "initial",
            "wrong",
            "takes the factors as they are, on the base as published",
            f"{_READ}: adapters/lora.py",
            ("to-lora",),
        ),
        Rule("replicated", "wrong", "knows no repeated layers", f"{_READ}: adapters/lora.py"),
        Rule(
            "beside", "wrong", "reads the adapter's own file only", f"{_READ}: utils/adapter.py", ("to-lora",)
        ),
    ),
)
