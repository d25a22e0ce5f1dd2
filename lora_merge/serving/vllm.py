"""vLLM: rank and scale of each module by PEFT's own rules, but only LoRA on linear layers."""

from __future__ import annotations

from lora_merge.serving.rules import Engine, Ranks, Rule
from lora_merge.serving.vllm_families import FAMILIES, STACKED_EXPERTS

_RUN = "vllm 0.32.0, vllm/lora, run on the CPU"
_READ = "vllm 0.32.0, vllm/lora, read"

_EMBEDDINGS = frozenset({"llama", "mixtral", "qwen3", "qwen3_moe"})
"""Families, among those that were run, whose classes have ``embedding_modules``."""

VLLM = Engine(
    name="vLLM",
    version="0.32.0",
    ranks=Ranks(
        most=512,
        default=16,
        option="--max-lora-rank",
        # The values that the option accepts.
        allowed=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        source=f"{_RUN}: config/lora.py:26, peft_helper.py:194",
    ),
    families=FAMILIES,
    rules=(
        Rule("kind", "refused", "reads LoRA only", f"{_RUN}: peft_helper.py:168, utils.py:220", ("to-lora",)),
        Rule("format", "refused", "reads PEFT's files", f"{_RUN}: lora_model.py:281", ("rewrite",)),
        Rule(
            "dora",
            "refused",
            "says that it does not support DoRA",
            f"{_RUN}: peft_helper.py:66",
            ("to-lora",),
        ),
        Rule(
            "modules-to-save",
            "refused",
            "says that it only supports modules_to_save being None",
            f"{_RUN}: peft_helper.py:56",
            ("to-lora",),
        ),
        Rule(
            "saved-embeddings",
            "wrong",
            "ignores saved embeddings, which is correct only if they equal the base's",
            f"{_RUN}: lora_model.py:246",
            ("without-copies",),
            by_base=True,
        ),
        Rule(
            "bias-said",
            "refused",
            "says that adapter bias is not supported",
            f"{_RUN}: peft_helper.py:199",
            ("rewrite",),
        ),
        Rule("bias", "refused", "says that adapter bias is not supported", f"{_RUN}: peft_helper.py:199"),
        Rule("lora-bias", "refused", "does not support lora_bias", f"{_RUN}: peft_helper.py:68"),
        Rule(
            "tokens",
            "refused",
            "refuses trained tokens as an unsupported LoRA weight",
            f"{_RUN}: utils.py:220",
            ("to-lora",),
        ),
        Rule(
            "initial",
            "refused",
            "refuses the initialisation by its name",
            f"{_RUN}: peft_helper.py:89",
            ("to-lora",),
        ),
        Rule("replicated", "refused", "does not support layer_replication", f"{_READ}: peft_helper.py:79"),
        Rule(
            "embedding",
            "refused",
            "has no LoRA on the embeddings of this family",
            f"{_RUN}: utils.py:223, lora_model.py:274",
            except_for=_EMBEDDINGS,
        ),
        Rule(
            "head",
            "refused",
            "has no LoRA on the embeddings of this family",
            f"{_RUN}: utils.py:223, lora_model.py:274",
            except_for=_EMBEDDINGS,
        ),
        Rule(
            "target-parameters",
            "refused",
            "expects separate experts, and drops those of Mixtral without an error",
            f"{_RUN}: model_manager.py:1264, mixtral.py:246",
            ("split-experts", "every-layer"),
            except_for=STACKED_EXPERTS,
        ),
        Rule(
            "stacked-parts",
            "refused",
            "fails unless gate_up_proj and down_proj both have factors",
            f"{_READ}: model_manager.py:_stack_moe_lora_weights",
            only_for=STACKED_EXPERTS,
        ),
        Rule(
            "experts",
            "option",
            "expects stacked experts for this family by default",
            f"{_READ}: model_manager.py:145, utils.py:411",
            only_for=STACKED_EXPERTS,
            option="vLLM's --enable-mixed-moe-lora-format",
        ),
        Rule(
            "tower",
            "wrong",
            "ignores or refuses LoRA on a tower, unless --enable-tower-connector-lora is given and the class supports it",
            f"{_READ}: model_manager.py:240",
        ),
        Rule(
            "some-experts",
            "refused",
            "fails unless every expert has all three projections",
            f"{_RUN}: lora_weights.py:206",
            ("every-layer",),
        ),
        Rule(
            "latent-kv",
            "wrong",
            "ignores LoRA on kv_b_proj, which it merges into other weights",
            f"{_RUN}: mla_attention.py:1248",
        ),
        Rule("convolution", "refused", "has LoRA for linear layers only", f"{_READ}: lora_model.py:246"),
        Rule(
            "beside",
            "wrong",
            "reads only the adapter's own weight file",
            f"{_READ}: lora_model.py:281",
            ("to-lora",),
        ),
    ),
)
