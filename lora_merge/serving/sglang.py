"""SGLang: one rank and one α/r for all tensors of an adapter; q needs v, and up needs gate."""

from __future__ import annotations

from lora_merge.serving.rules import Engine, Ranks, Rule
from lora_merge.serving.sglang_families import FAMILIES

_RUN = "sglang 0.5.23, sglang/srt/lora; its loader was run on the CPU"
_READ = "sglang 0.5.23, sglang/srt/lora, read"

SGLANG = Engine(
    name="SGLang",
    version="0.5.23",
    ranks=Ranks(
        most=0,
        default=0,
        option="--max-lora-rank",
        source="sglang 0.5.23, lora_manager.py; without the option the largest r of --lora-paths counts, read",
    ),
    families=FAMILIES,
    # Every tensor has to have the rank r of the config.
    always=("pad-rank",),
    rules=(
        Rule("kind", "refused", "reads LoRA only", f"{_RUN}: lora_config.py", ("to-lora",)),
        Rule("format", "refused", "reads PEFT's files", f"{_READ}: lora_config.py", ("rewrite",)),
        Rule(
            "regex",
            "refused",
            "says that only 'all' or 'all-linear' can be used as the string for target_modules",
            f"{_RUN}: utils.py:291",
            ("expand-targets",),
        ),
        Rule("rslora", "wrong", "multiplies by α/r", f"{_RUN}: lora.py:71", ("bake-scale",)),
        Rule("alphas-differ", "wrong", "takes one α for all modules", f"{_RUN}: lora.py:71", ("bake-scale",)),
        Rule(
            "ranks-differ",
            "refused",
            "fails at the first request unless every tensor has the rank r of the config",
            f"{_RUN}: mem_pool.py:908",
            ("pad-rank",),
        ),
        Rule(
            "packed-parts",
            "refused",
            "fails where q has no v beside it in its layer, k or v no q, or up no gate",
            f"{_RUN}: lora.py:289, 472",
            ("packed",),
        ),
        Rule(
            "dora",
            "refused",
            "says that it does not support DoRA",
            f"{_READ}: lora_manager.py:349",
            ("to-lora",),
        ),
        Rule(
            "modules-to-save",
            "wrong",
            "leaves whole modules out",
            f"{_RUN}: lora.py:179, mem_pool.py:1490",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "wrong",
            "leaves embeddings that are saved along out, which is right for copies only",
            f"{_RUN}: lora.py:179",
            ("without-copies",),
            by_base=True,
        ),
        Rule(
            "bias",
            "wrong",
            "leaves trained biases out, or fails at the first request",
            f"{_RUN}: mem_pool.py:983",
        ),
        Rule("lora-bias", "wrong", "leaves the bias of lora_B out", f"{_RUN}: mem_pool.py:1048"),
        Rule("tokens", "wrong", "leaves trained tokens out", f"{_RUN}: mem_pool.py:1407", ("to-lora",)),
        Rule(
            "target-parameters",
            "refused",
            "fails at the first request: it knows no such names",
            f"{_RUN}: mem_pool.py:983",
            ("split-experts",),
        ),
        Rule(
            "added-tokens",
            "refused",
            "refuses an added_tokens.json with ids beyond the base's vocabulary",
            f"{_READ}: lora_config.py:52, lora_manager.py:344",
            by_base=True,
        ),
        Rule(
            "convolution", "refused", "has LoRA for linear layers and embeddings only", f"{_READ}: utils.py"
        ),
        Rule(
            "initial",
            "wrong",
            "takes the factors as they are, on the base as published",
            f"{_READ}: lora.py",
            ("to-lora",),
        ),
        Rule("replicated", "wrong", "knows no repeated layers", f"{_READ}: lora_config.py"),
        Rule("beside", "wrong", "reads the adapter's own file only", f"{_READ}: lora.py", ("to-lora",)),
    ),
)
