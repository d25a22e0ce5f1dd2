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
        Rule("alphas-differ", "wrong", "uses one α for all modules", f"{_RUN}: lora.py:71", ("bake-scale",)),
        Rule(
            "ranks-differ",
            "refused",
            "fails at the first request unless all tensors have the configuration's rank r",
            f"{_RUN}: mem_pool.py:908",
            ("pad-rank",),
        ),
        Rule(
            "packed-parts",
            "refused",
            "fails if a layer has q without v, k or v without q, or up without gate",
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
            "ignores whole modules",
            f"{_RUN}: lora.py:179, mem_pool.py:1490",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "wrong",
            "ignores saved embeddings, which is correct only if they equal the base's",
            f"{_RUN}: lora.py:179",
            ("without-copies",),
            by_base=True,
        ),
        Rule(
            "bias",
            "wrong",
            "ignores trained biases, or fails at the first request",
            f"{_RUN}: mem_pool.py:983",
        ),
        Rule("lora-bias", "wrong", "ignores the bias of lora_B", f"{_RUN}: mem_pool.py:1048"),
        Rule("tokens", "wrong", "ignores trained tokens", f"{_RUN}: mem_pool.py:1407", ("to-lora",)),
        Rule(
            "target-parameters",
            "refused",
            "fails at the first request: it does not know these names",
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
            "uses the published base, without the change of the initialisation",
            f"{_READ}: lora.py",
            ("to-lora",),
        ),
        Rule("replicated", "wrong", "does not support repeated layers", f"{_READ}: lora_config.py"),
        Rule(
            "beside", "wrong", "reads only the adapter's own weight file", f"{_READ}: lora.py", ("to-lora",)
        ),
    ),
)
