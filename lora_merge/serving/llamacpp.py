"""llama.cpp: a GGUF file, for modules that its graphs have LoRA for."""

from __future__ import annotations

from lora_merge.serving.rules import Engine, Families, Ranks, Rule

_RUN = "llama.cpp in llama-cpp-python 0.3.36, run on the CPU"
_READ = "llama.cpp in llama-cpp-python 0.3.36, read"

_KNOWN = (
    "llama mistral mixtral qwen2 qwen3 qwen2_moe qwen3_moe qwen2_vl qwen2_5_vl gemma gemma2 gemma3 gemma3_text phi3 "
    "gpt_oss gpt2 gpt_neox granite granitemoe granitemoeshared falcon_h1 internlm2 deepseek_v2 deepseek_v3 glm4 "
    "olmo2 starcoder2 llava mistral3"
)

_FAMILIES = Families(
    key="model_type",
    served=dict.fromkeys(_KNOWN.split(), ""),
    source=f"{_READ}: conversion/*.py, src/models/*.cpp",
)
"""By ``model_type``: the families that `lora_merge.conversion.writers.gguf` can write."""

LLAMACPP = Engine(
    name="llama.cpp",
    version="llama-cpp-python 0.3.36",
    format="gguf",
    families=_FAMILIES,
    ranks=Ranks(most=0, source=f"{_RUN}: llama-adapter.h:53"),
    rules=(
        Rule("kind", "refused", "has LoRA only", f"{_RUN}: convert_lora_to_gguf.py:470", ("to-lora",)),
        Rule("dora", "refused", "has no DoRA", f"{_RUN}: convert_lora_to_gguf.py:479", ("to-lora",)),
        Rule(
            "modules-to-save",
            "refused",
            "has no place for whole modules, and ignores norms",
            f"{_RUN}: convert_lora_to_gguf.py:476",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "refused",
            "has no place for embeddings that are saved along",
            f"{_RUN}: convert_lora_to_gguf.py:479",
            ("without-copies",),
        ),
        Rule("bias", "refused", "has no place for biases", f"{_RUN}: convert_lora_to_gguf.py:479"),
        Rule(
            "lora-bias",
            "refused",
            "has no place for the bias of lora_B",
            f"{_RUN}: convert_lora_to_gguf.py:479",
        ),
        Rule(
            "tokens",
            "refused",
            "has no place for trained tokens",
            f"{_RUN}: convert_lora_to_gguf.py:479",
            ("to-lora",),
        ),
        Rule(
            "latent-query",
            "wrong",
            "loads LoRA on latent attention and does not apply it",
            f"{_RUN}: src/models/deepseek2.cpp:265",
        ),
        Rule(
            "latent",
            "wrong",
            "loads LoRA on latent attention and does not apply it",
            f"{_RUN}: src/models/deepseek2.cpp:265",
        ),
        Rule(
            "latent-kv",
            "wrong",
            "loads LoRA on latent attention and does not apply it",
            f"{_RUN}: src/models/deepseek2.cpp:265",
        ),
        Rule(
            "convolution",
            "refused",
            "has LoRA for linear layers and embeddings only",
            f"{_READ}: src/llama-graph.cpp:1520",
        ),
        Rule(
            "initial",
            "wrong",
            "takes the factors as they are, on the base as published",
            f"{_READ}: src/llama-adapter.cpp",
            ("to-lora",),
        ),
        Rule("replicated", "refused", "knows no repeated layers", f"{_READ}: src/llama-adapter.cpp:335"),
        Rule(
            "beside",
            "refused",
            "has no place for whole modules",
            f"{_READ}: convert_lora_to_gguf.py:479",
            ("to-lora",),
        ),
    ),
)
