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
            "cannot hold whole modules, and ignores norms",
            f"{_RUN}: convert_lora_to_gguf.py:476",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "refused",
            "cannot hold saved embeddings",
            f"{_RUN}: convert_lora_to_gguf.py:479",
            ("without-copies",),
        ),
        Rule("bias", "refused", "cannot hold biases", f"{_RUN}: convert_lora_to_gguf.py:479"),
        Rule(
            "lora-bias",
            "refused",
            "cannot hold the bias of lora_B",
            f"{_RUN}: convert_lora_to_gguf.py:479",
        ),
        Rule(
            "tokens",
            "refused",
            "cannot hold trained tokens",
            f"{_RUN}: convert_lora_to_gguf.py:479",
            ("to-lora",),
        ),
        Rule(
            "latent-query",
            "wrong",
            "loads LoRA on latent attention, but does not apply it",
            f"{_RUN}: src/models/deepseek2.cpp:265",
        ),
        Rule(
            "latent",
            "wrong",
            "loads LoRA on latent attention, but does not apply it",
            f"{_RUN}: src/models/deepseek2.cpp:265",
        ),
        Rule(
            "latent-kv",
            "wrong",
            "loads LoRA on latent attention, but does not apply it",
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
            "uses the published base, without the change of the initialisation",
            f"{_READ}: src/llama-adapter.cpp",
            ("to-lora",),
        ),
        Rule(
            "replicated", "refused", "does not support repeated layers", f"{_READ}: src/llama-adapter.cpp:335"
        ),
        Rule(
            "beside",
            "refused",
            "cannot hold whole modules",
            f"{_READ}: convert_lora_to_gguf.py:479",
            ("to-lora",),
        ),
    ),
)
