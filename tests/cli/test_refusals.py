"""One tampering per refusal: its own sentence, exit code 4, and nothing written.

The cases are those of PEFT that are silent, or only a warning, for LoRA (PEFT 0.21.2).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from lora_merge.cli import exits
from tests.tampering import edit_json, edit_tensors

LAYER = "base_model.model.model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"


@dataclass
class Case:
    """One way to break an adapter, and what the refusal must say."""

    name: str
    says: tuple[str, ...]
    code: str
    config: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[dict[str, Any]], None] | None = None
    family: str = "llama"
    base_config: dict[str, Any] = field(default_factory=dict)
    base_tensors: Callable[[dict[str, Any]], None] | None = None


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def add(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        import torch

        tensors[name] = torch.ones(shape)

    return change


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def reshape(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    return add(name, *shape)


def fill(name: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[3] = value

    return change


def several(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for one in changes:
            one(tensors)

    return change


def to_dtype(name: str, dtype: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        import torch

        tensors[name] = tensors[name].to(getattr(torch, dtype))

    return change


CASES = [
    # 1. half a pair
    Case("A without B", ("has lora_A and no lora_B",), "missing-B", tensors=drop(f"{Q}.lora_B.weight")),
    Case("B without A", ("has lora_B and no lora_A",), "missing-A", tensors=drop(f"{Q}.lora_A.weight")),
    Case(
        "a whole module lost",
        ("layers.0.self_attn.q_proj", "the config targets it, and the adapter has no tensors"),
        "missing-module",
        tensors=drop(f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"),
    ),
    # 2. tensors that PEFT would drop
    Case(
        "a module that the config does not target",
        ("target_modules does not match it",),
        "unexpected-tensor",
        config={"target_modules": ["down_proj"]},
    ),
    Case(
        "a module that a regex does not match",
        ("target_modules does not match it",),
        "unexpected-tensor",
        config={"target_modules": r".*\.(?!q_proj)[a-z]+_proj"},
    ),
    Case(
        "a module that is excluded",
        ("exclude_modules leaves it out",),
        "unexpected-tensor",
        config={"exclude_modules": ["q_proj"]},
    ),
    Case(
        "a layer that is left out",
        ("layers.1", "layers_to_transform leaves its layer out"),
        "unexpected-tensor",
        config={"layers_to_transform": [0]},
    ),
    Case(
        "the output embedding under all-linear",
        ("lm_head", "all-linear"),
        "unexpected-tensor",
        config={"target_modules": "all-linear"},
        tensors=several(
            add("base_model.model.lm_head.lora_A.weight", 4, 64),
            add("base_model.model.lm_head.lora_B.weight", 96, 4),
        ),
    ),
    Case(
        "layers beyond the model",
        ("layers.7", "the base has no model.layers.7.self_attn.q_proj.weight", "nearest"),
        "unmatched-module",
        tensors=rename("layers.1.", "layers.7."),
    ),
    Case(
        "a tensor of no kind",
        ("something.else", "is no tensor of a LoRA adapter"),
        "unexpected-tensor",
        tensors=add("base_model.model.something.else", 2, 2),
    ),
    # 3. wrong prefixes
    Case(
        "no prefix",
        ("tensors lack the prefix base_model.model.",),
        "wrong-prefix",
        tensors=rename("base_model.model.", ""),
    ),
    Case(
        "a prefix of another class",
        ("none of the adapter's 4 modules is in the base", "which has model.layers"),
        "wrong-prefix",
        tensors=rename("base_model.model.model.", "base_model.model.language_model.model."),
    ),
    Case(
        "tensors of an adapter with a name",
        ("is of an adapter that has a name of its own",),
        "unexpected-tensor",
        tensors=rename("lora_A.weight", "lora_A.mine.weight"),
    ),
    Case(
        "a module spelled twice",
        ("is a second lora_A of its module",),
        "duplicate-tensor",
        tensors=add(f"{Q}.lora_A.default.weight", 4, 64),
    ),
    # 4. sizes
    Case(
        "factors of a pruned model",
        (
            "layers.0.self_attn.q_proj: lora_B is (48, 4), the base needs (64, 4)",
            "the adapter was trained on another, perhaps pruned, model",
        ),
        "shape-mismatch",
        tensors=reshape(f"{Q}.lora_B.weight", 48, 4),
    ),
    Case(
        "factors of another width",
        ("lora_A is (4, 48), the base needs (4, 64)",),
        "shape-mismatch",
        tensors=reshape(f"{Q}.lora_A.weight", 4, 48),
    ),
    Case(
        "factors of two ranks",
        ("lora_A is (4, 64), lora_B is (64, 3)", "of one rank"),
        "bad-shape",
        tensors=reshape(f"{Q}.lora_B.weight", 64, 3),
    ),
    Case("another rank in the config", ("has rank 4, the config says 8",), "rank-mismatch", config={"r": 8}),
    # 5. and 6. entries and patterns without a match
    Case(
        "a target that matches nothing",
        ("the entry 'wqkv' matches none of the adapter's 4 modules",),
        "unmatched-target",
        config={"target_modules": ["q_proj", "down_proj", "wqkv"]},
    ),
    Case(
        "a rank pattern that matches nothing",
        ("rank_pattern", "'k_proj' matches none of the adapter's 4 modules"),
        "unmatched-pattern",
        config={"rank_pattern": {"k_proj": 8}},
    ),
    Case(
        "an alpha pattern that matches nothing",
        ("alpha_pattern", "'layers.9.q_proj' matches none"),
        "unmatched-pattern",
        config={"alpha_pattern": {"layers.9.q_proj": 8}},
    ),
    Case(
        "two patterns that disagree",
        ("alpha_pattern gives it several values", "which came first in training is lost"),
        "ambiguous-pattern",
        config={"alpha_pattern": {"q_proj": 8, r"layers.\d.self_attn.q_proj": 16}},
    ),
    # 7. fields
    Case(
        "a field of a later PEFT",
        ("warp_drive: is {'on': 1}, and PEFT 0.21 knows no such field",),
        "unknown-field",
        config={"warp_drive": {"on": 1}},
    ),
    Case("a rank that is no number", ("r: is '4', expected a number",), "bad-field", config={"r": "4"}),
    Case(
        "a regex that does not compile",
        ("target_modules", "is not a regular expression"),
        "bad-field",
        config={"target_modules": "(q_proj"},
    ),
    # 8. to 11. kinds that are not built
    Case(
        "modules_to_save", ("fully trained modules",), "unsupported", config={"modules_to_save": ["lm_head"]}
    ),
    Case(
        "a trained weight that the config does not name",
        ("model.norm.weight: is a fully trained weight", "not merged by this version"),
        "unexpected-tensor",
        tensors=several(
            add("base_model.model.model.norm.weight", 64), fill("base_model.model.model.norm.weight", 2.0)
        ),
    ),
    Case(
        "an embedding saved with the adapter",
        ("embed_tokens.base_layer.weight: is a fully trained weight",),
        "unexpected-tensor",
        tensors=add("base_model.model.model.embed_tokens.base_layer.weight", 96, 64),
    ),
    Case("trained biases", ("trained biases are not merged",), "unsupported", config={"bias": "all"}),
    Case("DoRA", ("use_dora: DoRA",), "unsupported", config={"use_dora": True}),
    Case(
        "magnitudes without use_dora",
        ("is a DoRA magnitude",),
        "unexpected-tensor",
        tensors=add(f"{Q}.lora_magnitude_vector", 64),
    ),
    # 12. values
    Case(
        "NaN",
        ("q_proj.lora_B.weight: holds 1 values that are NaN",),
        "non-finite",
        tensors=fill(f"{Q}.lora_B.weight", float("nan")),
    ),
    Case(
        "infinity",
        ("holds 1 values that are NaN or infinite",),
        "non-finite",
        tensors=fill(f"{Q}.lora_A.weight", float("-inf")),
    ),
    # 14. and 15. bases that change
    Case(
        "PiSSA",
        ("'pissa', which changes the base's weights",),
        "unsupported",
        config={"init_lora_weights": "pissa"},
    ),
    Case(
        "LoftQ",
        ("'loftq', which changes the base's weights",),
        "unsupported",
        config={"init_lora_weights": "loftq"},
    ),
    Case("layer replication", ("replicated layers",), "unsupported", config={"layer_replication": [[0, 2]]}),
    Case(
        "aLoRA",
        ("aLoRA acts only after", "no merged form"),
        "unsupported",
        config={"alora_invocation_tokens": [1, 2]},
    ),
    Case(
        "Arrow",
        ("Arrow routes between", "no merged form"),
        "unsupported",
        config={"arrow_config": {"top_k": 2}},
    ),
    Case("AdaLoRA", ("'ADALORA' adapters are not merged",), "unsupported", config={"peft_type": "ADALORA"}),
    Case(
        "prompt tuning",
        ("PROMPT_TUNING adapter cannot be merged",),
        "unsupported",
        config={"peft_type": "PROMPT_TUNING"},
    ),
    Case(
        "X-LoRA", ("XLORA adapter cannot be merged", "router"), "unsupported", config={"peft_type": "XLORA"}
    ),
    Case("BONE", ("'BONE' adapters are not merged",), "unsupported", config={"peft_type": "BONE"}),
    Case(
        "an output embedding that is tied and not stored",
        ("lm_head", "tied to the input embedding"),
        "unsupported",
        family="llama_tied",
        config={"target_modules": ["q_proj", "down_proj", "lm_head"]},
        tensors=several(
            add("base_model.model.lm_head.lora_A.weight", 4, 64),
            add("base_model.model.lm_head.lora_B.weight", 96, 4),
        ),
    ),
    Case(
        "an output embedding that is tied and stored",
        ("lm_head", "tie_word_embeddings"),
        "unsupported",
        config={"target_modules": ["q_proj", "down_proj", "lm_head"]},
        tensors=several(
            add("base_model.model.lm_head.lora_A.weight", 4, 64),
            add("base_model.model.lm_head.lora_B.weight", 96, 4),
        ),
        base_config={"tie_word_embeddings": True},
    ),
    Case(
        "LoRA on an embedding",
        ("is LoRA on an embedding",),
        "unexpected-tensor",
        tensors=add("base_model.model.model.embed_tokens.lora_embedding_A", 4, 96),
    ),
    Case(
        "a convolution",
        ("LoRA on convolutions",),
        "unsupported",
        tensors=several(reshape(f"{Q}.lora_A.weight", 4, 64, 1), reshape(f"{Q}.lora_B.weight", 64, 4, 1)),
    ),
    Case(
        "factors in float64",
        ("is stored as F64, expected BF16, F16 or F32",),
        "bad-dtype",
        tensors=to_dtype(f"{Q}.lora_A.weight", "float64"),
    ),
    # bases
    Case(
        "a base that says it is quantised",
        ("the base is stored quantised (fp8)", "full-precision parent"),
        "unsupported",
        base_config={"quantization_config": {"quant_method": "fp8"}},
    ),
    Case(
        "a base with packed weights",
        ("q_proj.qweight: the base is stored quantised", "full-precision parent"),
        "unsupported",
        base_tensors=rename("layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.qweight"),
    ),
    Case(
        "a base with scaled weights",
        ("weight_scale_inv: the base is stored quantised",),
        "unsupported",
        base_tensors=add("model.layers.0.self_attn.q_proj.weight_scale_inv", 1, 1),
    ),
    Case(
        "a target in float64",
        ("q_proj.weight: is stored as F64",),
        "unsupported",
        base_tensors=to_dtype("model.layers.0.self_attn.q_proj.weight", "float64"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_disagreement_is_refused_with_its_own_sentence(case, pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(case.family), "base")
    adapter = tampered(pico_adapter(pico(case.family)), "adapter")
    edit_json(base / "config.json", **case.base_config)
    if case.base_tensors:
        edit_tensors(base / "model.safetensors", case.base_tensors)
    edit_json(adapter / "adapter_config.json", **case.config)
    if case.tensors:
        edit_tensors(adapter / "adapter_model.safetensors", case.tensors)

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")

    assert result.exit_code == exits.PLAN, result.stderr
    for words in case.says:
        assert words in result.stderr
    assert case.code in {issue["code"] for issue in json.loads(result.stdout)["issues"]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_every_problem_is_named_in_one_message(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", use_dora=True, rank_pattern={"k_proj": 2})
    edit_tensors(
        adapter / "adapter_model.safetensors",
        several(drop(f"{Q}.lora_B.weight"), reshape(f"{LAYER}.mlp.down_proj.lora_A.weight", 4, 48)),
    )

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert "4 problems" in result.stderr
    for words in ("DoRA", "'k_proj' matches none", "no lora_B", "lora_A is (4, 48)"):
        assert words in result.stderr


def test_a_rank_that_disagrees_hides_no_other_problem(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", r=8, target_modules=["q_proj", "wqkv"])

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    for words in ("has rank 4, the config says 8", "the entry 'wqkv'", "target_modules does not match it"):
        assert words in result.stderr


def test_the_same_problem_in_many_modules_is_one_line(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", r=8)

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert "and 3 more" in result.stderr
    assert result.stderr.count("has rank 4, the config says 8") == 1


def test_an_unknown_field_that_is_empty_is_a_warning_and_strict_refuses_it(
    pico, pico_adapter, tampered, cli, tmp_path
):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", warp_drive=None)

    strict = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", "--strict")
    merged = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert strict.exit_code == exits.PLAN
    assert "warp_drive" in strict.stderr
    assert merged.exit_code == exits.OK
    assert "warning: warp_drive" in merged.stderr


def test_fields_that_only_training_reads_are_ignored(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", lora_dtype="bfloat16", lorap_lr_ratio=16, lorap_emb_lr=1e-6)

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.stderr
