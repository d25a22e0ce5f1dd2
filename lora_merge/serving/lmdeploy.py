"""LMDeploy's PyTorch engine: one rank and α/r for all, targets by their last names, in every layer. TurboMind has none."""

from __future__ import annotations

from lora_merge.serving.lmdeploy_families import FAMILIES, UNPACKED
from lora_merge.serving.rules import Engine, Ranks, Rule

_RUN = "lmdeploy 0.18.0, lmdeploy/pytorch, run on the CPU with PEFT 0.14"
_READ = "lmdeploy 0.18.0, lmdeploy/pytorch, read"

LMDEPLOY = Engine(
    name="LMDeploy",
    version="0.18.0",
    ranks=Ranks(
        most=0,
        allowed=(*range(1, 17), 32, 64, 128, 256, 512),
        by_padding=True,
        effect="refused",
        otherwise="has a kernel for ranks up to 16 and for powers of two",
        source="lmdeploy 0.18.0, lmdeploy/pytorch/kernels/cuda/fused_lora.py:105, its kernel run in Triton's interpreter",
    ),
    families=FAMILIES,
    # A module with the name of a target but without tensors gets whatever is in memory, so each one gets
    # zeros.
    always=("expand-targets", "every-name"),
    rules=(
        Rule(
            "kind",
            "refused",
            "fails on any other method than LoRA",
            f"{_RUN}: adapter/adapter.py:19",
            ("to-lora",),
        ),
        Rule("format", "refused", "reads PEFT's files", f"{_RUN}: models/patch.py:327", ("rewrite",)),
        Rule(
            "regex",
            "refused",
            "iterates over the characters of the regex",
            f"{_RUN}: models/patch.py:275",
            ("expand-targets",),
        ),
        Rule(
            "all-linear",
            "refused",
            "does not know this module",
            f"{_RUN}: adapter/adapter.py:107",
            ("expand-targets",),
        ),
        Rule(
            "listed-paths",
            "refused",
            "shortens paths to their last names, which are then not unique",
            f"{_RUN}: models/patch.py:294",
            ("expand-targets",),
        ),
        Rule(
            "new-fields",
            "refused",
            "refuses configuration fields newer than PEFT 0.14",
            f"{_RUN}: PEFT 0.14, config.py:158",
            ("expand-targets",),
        ),
        Rule("rslora", "wrong", "multiplies by α/r", f"{_RUN}: adapter/adapter.py:20", ("bake-scale",)),
        Rule(
            "alphas-differ",
            "wrong",
            "uses one α for all modules",
            f"{_RUN}: adapter/adapter.py:20",
            ("bake-scale",),
        ),
        Rule(
            "ranks-differ",
            "refused",
            "fails if a module's rank differs from r",
            f"{_RUN}: nn/linear/lora.py:78",
            ("pad-rank",),
        ),
        Rule(
            "some-layers",
            "wrong",
            "reads uninitialised memory for layers without tensors, possibly NaN",
            f"{_RUN}: models/patch.py:306",
            ("every-name",),
        ),
        Rule(
            "excluded",
            "wrong",
            "reads uninitialised memory for the missing modules",
            f"{_RUN}: models/patch.py:306",
            ("expand-targets", "every-name"),
            by_base=True,
        ),
        Rule("dora", "refused", "fails on the magnitudes", f"{_RUN}: adapter/adapter.py:96", ("to-lora",)),
        Rule("modules-to-save", "refused", "fails on whole modules", f"{_RUN}: adapter/adapter.py:97"),
        Rule(
            "saved-embeddings",
            "refused",
            "fails on saved embeddings",
            f"{_RUN}: adapter/adapter.py:97",
            ("without-copies",),
        ),
        Rule("bias", "refused", "fails on trained biases", f"{_RUN}: adapter/adapter.py:96"),
        Rule("lora-bias", "refused", "fails on the bias of lora_B", f"{_RUN}: adapter/adapter.py:96"),
        Rule("tokens", "refused", "fails on trained tokens", f"{_RUN}: adapter/adapter.py:96"),
        Rule("embedding", "refused", "fails on LoRA on embeddings", f"{_RUN}: models/patch.py:294"),
        Rule("head", "refused", "fails on LoRA on the output embedding", f"{_RUN}: adapter/adapter.py:107"),
        Rule("target-parameters", "refused", "has no LoRA on experts", f"{_RUN}: adapter/adapter.py:107"),
        Rule("experts", "refused", "has no LoRA on experts", f"{_RUN}: adapter/adapter.py:107"),
        Rule("router", "refused", "has no LoRA on routers", f"{_RUN}: adapter/adapter.py:107"),
        Rule(
            "latent",
            "wrong",
            "reorders the rows of the base for its rotary embedding, but not those of B",
            f"{_RUN}: models/deepseek_v2.py:1250",
        ),
        Rule("latent-kv", "wrong", "ignores LoRA on kv_b_proj", f"{_RUN}: models/deepseek_v2.py:496"),
        Rule(
            "packed",
            "refused",
            "does not find q, k, v, gate and up in this family",
            f"{_RUN}: adapter/adapter.py:107",
            only_for=UNPACKED,
        ),
        Rule(
            "language-model",
            "refused",
            "uses the module names of transformers 4",
            f"{_RUN}: adapter/adapter.py:107",
            ("rename-v4",),
            only_for=frozenset({"qwen2_vl", "qwen2_5_vl"}),
        ),
        Rule("convolution", "refused", "has LoRA for linear layers only", f"{_READ}: models/patch.py:294"),
        Rule(
            "initial",
            "wrong",
            "uses the published base, without the change of the initialisation",
            f"{_RUN}: adapter/adapter.py",
            ("to-lora",),
        ),
        Rule("replicated", "refused", "does not support repeated layers", f"{_READ}: adapter/adapter.py:107"),
        Rule("beside", "wrong", "reads only the adapter's own weight file", f"{_READ}: models/patch.py:327"),
    ),
)
