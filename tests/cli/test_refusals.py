"""One tampering per refusal: its own sentence, exit code 4, and nothing written.

The cases are those of PEFT that are silent, or only a warning, for LoRA (PEFT 0.21.2).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lora_merge.adapters.swift import OTHER_TUNERS
from lora_merge.cli import exits
from lora_merge.peft_rules.kinds import DECOMPOSING, MUTATING_INITS, NOT_IN_WEIGHTS, UNMERGEABLE_FIELDS
from tests import twins
from tests.parity import building
from tests.parity.kinds import KINDS, Kind
from tests.tampering import edit_json, edit_tensors

ROOT = Path(__file__).parents[2]
LAYER = "base_model.model.model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
CONVOLUTION = "base_model.model.encoder.stages.0.layers.0.layer.1.convolution"
MLX_Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


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
    kind: str = ""
    """A kind of adapter by its name in `KINDS` or `OTHER_KINDS`, on the model ``family``; else a plain LoRA."""
    weight: str = ""
    """What stands behind the adapter on the command line."""
    options: tuple[str, ...] = ()
    format: str = ""
    """The format that the adapter is turned into before it is changed; else PEFT's."""
    beside: Callable[[Path], None] | None = None
    """Puts files beside the adapter."""


def drop(*names: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in names:
            del tensors[name]

    return change


def zeros(role: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if f".{role}." in name:
                tensor.zero_()

    return change


def add(name: str, *shape: int) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        import torch

        tensors[name] = torch.ones(shape)

    return change


def double(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: tensors[name] * 2})


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


def drop_all(part: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        names = [name for name in tensors if part in name]
        assert names
        for name in names:
            del tensors[name]

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


def write_tensors(path: Path, name: str, *shape: int, value: float = 1.0) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({name: torch.full(shape, value)}, path)


def write_extra_states(root: Path, keys: Any, name: str = "", *shape: int) -> None:
    folder = root / "extra_states"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"extra_state_keys": keys}))
    if name:
        write_tensors(folder / "adapter_model.safetensors", name, *shape)


def named(kind: str, name: str, config_class: str, model: str, **fields: Any) -> Kind:
    return Kind(name, "other PEFT methods", kind, config_class, fields, (model,))


OTHER_KINDS = {
    kind.name: kind
    for kind in [
        named("LORA", "LoRA on one end of Gemma", "LoraConfig", "gemma", r=4, target_modules=["q_proj", "lm_head"]),
        named("LORA", "LoRA on one end of Cohere", "LoraConfig", "cohere", r=4, target_modules=["lm_head"]),
        named("LORA", "LoRA on one end of T5", "LoraConfig", "t5", r=4, target_modules=["q", "lm_head"]),
        named(
            "OFT", "OFT on a 3×3 convolution", "OFTConfig", "resnet", oft_block_size=8,
            target_modules=["layer.1.convolution"],
        ),
        named(
            "LOHA", "LoHa under weight_norm", "LoHaConfig", "wav2vec2", r=4, target_modules=["pos_conv_embed.conv"]
        ),
    ]
}  # fmt: skip
ONE_PARAMETER = "LoRA on stacked experts (target_parameters), one parameter"
TWO_PARAMETERS = "LoRA on stacked experts (target_parameters), two parameters"


def square_experts(tensors: dict[str, Any]) -> None:
    """Give the base experts of 64 × 64."""
    for layer in (0, 1):
        experts = f"model.layers.{layer}.mlp.experts"
        add(f"{experts}.down_proj", 4, 64, 64)(tensors)
        add(f"{experts}.gate_up_proj", 4, 128, 64)(tensors)


def square_factors(tensors: dict[str, Any]) -> None:
    """Give the adapter factors for experts of 64 × 64."""
    for name in [name for name in tensors if "lora_A" in name]:
        add(name, 16, 64)(tensors)


def square_case(name: str, version: Any, **changes: Any) -> Case:
    return Case(
        name,
        ("its experts are square, (4, 64, 64)", f"the adapter's peft_version is {version!r}"),
        "ambiguous-orientation",
        kind=ONE_PARAMETER,
        family="qwen3_moe",
        config={"peft_version": version},
        tensors=square_factors,
        base_tensors=square_experts,
        base_config={"moe_intermediate_size": 64, **changes},
    )


def in_two_towers(tensors: dict[str, Any]) -> None:
    """Give a base that has every layer twice, under two paths that are not the adapter's."""
    for name in [name for name in tensors if name.startswith("model.layers.")]:
        tensor = tensors.pop(name)
        tensors[name.replace("model.", "text.model.", 1)] = tensor
        tensors[name.replace("model.", "vision.model.", 1)] = tensor.clone()


def one_projection_in_each_of_two_towers(tensors: dict[str, Any]) -> None:
    """Give a base whose projections lie under one path, and all else under another."""
    for name in [name for name in tensors if name.startswith("model.layers.")]:
        tower = "vision" if "down_proj" in name else "text"
        tensors[f"{tower}.{name}"] = tensors.pop(name)


def again_without_prefix(tensors: dict[str, Any]) -> None:
    """Give an adapter one module a second time, under the name that it has on the Hub."""
    for name in [name for name in tensors if "transformer.h.0.attn.c_attn" in name]:
        tensors[name.replace("model.transformer.h.", "model.h.")] = tensors[name].clone()


UNKNOWN = {"model_type": "of_remote_code", "architectures": ["OfRemoteCode"]}

CASES = [
    Case(
        "names that end as those of two towers",
        ("layers.0.self_attn.q_proj", "matches 2 tensors of the base", "text.model.layers.0", "vision.model"),
        "no-one-place",
        base_config=UNKNOWN,
        base_tensors=in_two_towers,
    ),
    Case(
        "names that end as those of one tower here and of another there",
        ("endings of several parts of the base: text., vision.",),
        "no-one-place",
        base_config=UNKNOWN,
        base_tensors=one_projection_in_each_of_two_towers,
    ),
    Case(
        "one weight under two names",
        (
            "h.0.attn.c_attn.weight: means the base's transformer.h.0.attn.c_attn.weight, and so does the adapter's",
        ),
        "named-twice",
        tensors=again_without_prefix,
        family="gpt2",
        kind="LoRA on Conv1D",
    ),
    Case(
        "an alpha of 0",
        ("lora_alpha: is 0, so the scale is 0 and the adapter changes nothing", "adapter_config.json"),
        "zero-scale",
        config={"lora_alpha": 0},
    ),
    Case(
        "an alpha of 0 with patterns for some modules only",
        ("lora_alpha: is 0",),
        "zero-scale",
        config={"lora_alpha": 0, "alpha_pattern": {"q_proj": 8}},
    ),
    Case(
        "two ways to store the output",
        (
            "--quantize fp8 and --out-storage mixed both say how the weights are stored",
            "pass only one of the two",
        ),
        "contradiction",
        options=("--quantize", "fp8", "--out-storage", "mixed"),
    ),
    Case(
        "a scheme that fits no layer",
        ("has no linear layer that --quantize fp8 can store", "is not a multiple of 128", "choose another"),
        "quantize",
        options=("--quantize", "fp8"),
    ),
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
        ("exclude_modules excludes it",),
        "unexpected-tensor",
        config={"exclude_modules": ["q_proj"]},
    ),
    Case(
        "a layer that is left out",
        ("layers.1", "layers_to_transform does not include its layer"),
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
        ("something.else", "is not a tensor of a LoRA adapter"),
        "unexpected-tensor",
        tensors=add("base_model.model.something.else", 2, 2),
    ),
    # 3. wrong prefixes
    Case(
        "no prefix",
        ("tensors do not have the prefix base_model.model.",),
        "wrong-prefix",
        tensors=rename("base_model.model.", ""),
    ),
    Case(
        "a prefix of another class",
        ("the adapter is for a multimodal model, and the base is only a language model",),
        "wrong-prefix",
        tensors=rename("base_model.model.model.", "base_model.model.language_model.model."),
    ),
    Case(
        "an adapter that was never trained",
        ("has no effect: lora_A or lora_B is all zeros in each of its 4 modules",),
        "no-effect",
        tensors=zeros("lora_B"),
    ),
    Case(
        "an adapter's name in half of the names",
        ("lora_B.weight: has no adapter name, and 4 other tensors have the adapter name 'mine'",),
        "unexpected-tensor",
        tensors=rename("lora_A.weight", "lora_A.mine.weight"),
    ),
    Case(
        "two adapters in one file",
        (
            "adapter_model.safetensors: contains the tensors of 2 adapters (mine, yours), expected one adapter",
        ),
        "several-adapters",
        tensors=several(
            rename("lora_A.weight", "lora_A.yours.weight"), rename("lora_B.weight", "lora_B.mine.weight")
        ),
    ),
    Case(
        "a module spelled twice",
        (f"is in the file twice; the other spelling of its name is {Q}.lora_A.weight",),
        "duplicate-tensor",
        tensors=add(f"{Q}.lora_A.default.weight", 4, 64),
    ),
    Case(
        "a module spelled twice, once as torch.compile has it",
        ("is in the file twice",),
        "duplicate-tensor",
        tensors=add(f"base_model.model._orig_mod.{Q.removeprefix('base_model.model.')}.lora_A.weight", 4, 64),
    ),
    Case(
        "a factor spelled with and without weight",
        ("is a second lora_A of its module",),
        "duplicate-tensor",
        tensors=add(f"{Q}.lora_A", 4, 64),
    ),
    # ms-swift
    *(
        Case(
            f"ms-swift's {kind}",
            (f"swift_type: a {kind} adapter of ms-swift cannot be merged: {why}",),
            "unsupported",
            config={"swift_type": kind},
            format="ms-swift",
        )
        for kind, why in OTHER_TUNERS.items()
    ),
    Case(
        "a tuner of a later ms-swift",
        ("swift_type: is 'WARP', which is not a tuner of ms-swift 4",),
        "unsupported",
        config={"swift_type": "WARP"},
        format="ms-swift",
    ),
    Case(
        "factors of parts of a fused layer",
        ("use_merged_linear: its factors belong to parts of a fused layer",),
        "unsupported",
        config={"use_merged_linear": True, "enable_lora": [True, False]},
        format="ms-swift",
    ),
    Case(
        "QA-LoRA of ms-swift",
        ("use_qa_lora: a QA-LoRA delta belongs to a quantised weight",),
        "unsupported",
        config={"use_qa_lora": True},
        format="ms-swift",
    ),
    Case(
        "patterns of ms-swift",
        ("alpha_pattern: is set, and ms-swift uses a different rule from PEFT to find a module's entry",),
        "unsupported",
        config={"alpha_pattern": {"q_proj": 6}},
        format="ms-swift",
    ),
    Case(
        "a field of a later ms-swift",
        ("warp_drive: is 2, and PEFT 0.21 does not know this field",),
        "unknown-field",
        beside=lambda root: (root / "additional_config.json").write_text(
            '{"lora_dtype": null, "warp_drive": 2}'
        ),
    ),
    Case(
        "vision weights of another model",
        (
            "vision.weight: was read from vit.safetensors, and the base has no parameter vision.weight",
            "--ignore-file vit.safetensors",
        ),
        "unmatched-module",
        beside=lambda root: write_tensors(root / "vit.safetensors", "base_model.model.vision.weight", 4, 64),
    ),
    Case(
        "vision weights by a half",
        ("norm.weight: replaces a whole parameter, so it cannot be scaled by the weight 0.5",),
        "weighted-replacement",
        beside=lambda root: write_tensors(
            root / "vit.safetensors", "base_model.model.model.norm.weight", 64, value=2.0
        ),
        weight=":0.5",
    ),
    Case(
        "vision weights that are none",
        ("lora_A.weight: is not a whole parameter, and it is in vit.safetensors",),
        "unexpected-tensor",
        beside=lambda root: write_tensors(root / "vit.safetensors", f"{Q}.lora_A.weight", 4, 64),
    ),
    Case(
        "a parameter in the adapter and beside it",
        ("lm_head.weight: has different values in adapter_model.safetensors and in a second file",),
        "duplicate-tensor",
        config={"modules_to_save": ["lm_head"]},
        tensors=add(f"{HEAD}.weight", 96, 64),
        beside=lambda root: write_tensors(root / "vit.safetensors", f"{HEAD}.weight", 96, 64, value=2.0),
    ),
    Case(
        "a file beside the adapter that nothing reads",
        ("value_head.bin: has the value head of a reward model", "--ignore-file value_head.bin"),
        "unread-file",
        beside=lambda root: (root / "value_head.bin").write_bytes(b"weights"),
    ),
    Case(
        "factors that DeepSpeed ZeRO-3 left empty",
        ("adapter_model.safetensors: 1 of its 9 tensors have no values", "zero_to_fp32.py"),
        "sharded-state",
        tensors=add(f"{LAYER}.self_attn.k_proj.lora_A.weight", 0),
    ),
    Case(
        "vision weights that diverged",
        ("norm.weight: has 64 NaN or infinite values",),
        "non-finite",
        beside=lambda root: write_tensors(
            root / "vit.safetensors", "base_model.model.model.norm.weight", 64, value=float("nan")
        ),
    ),
    Case(
        "extra states that nobody asked for",
        ("lm_head.weight: is an extra state, and extra_state_keys does not match it",),
        "unexpected-tensor",
        beside=lambda root: write_extra_states(root, [r"model\.norm\..*"], "lm_head.weight", 96, 64),
    ),
    Case(
        "extra states of no regex",
        ("extra_state_keys: is 'lm_head', expected a list of regular expressions",),
        "bad-field",
        beside=lambda root: write_extra_states(root, "lm_head", "lm_head.weight", 96, 64),
    ),
    Case(
        "extra states that are not there",
        ("names extra states, and extra_states/adapter_model.safetensors does not exist",),
        "missing-module",
        beside=lambda root: write_extra_states(root, ["lm_head.*"]),
    ),
    # mlx-lm
    Case(
        "MLX without a scale",
        ("lora_parameters.scale: is missing, expected a number",),
        "bad-field",
        config={"lora_parameters": {"rank": 4}},
        format="mlx",
    ),
    Case(
        "MLX with a scale that is no number",
        ("lora_parameters.scale: is '20', expected a number",),
        "bad-field",
        config={"lora_parameters": {"rank": 4, "scale": "20"}},
        format="mlx",
    ),
    Case(
        "MLX with a scale of 0",
        ("lora_parameters.scale: is 0, so the adapter changes nothing",),
        "bad-field",
        config={"lora_parameters": {"rank": 4, "scale": 0.0}},
        format="mlx",
    ),
    Case(
        "MLX with an alpha that two versions read differently",
        (
            "lora_parameters.alpha: is 16: mlx-lm multiplied scale by alpha/rank until June 2024",
            "set scale to 10 x 16/4",
        ),
        "bad-field",
        config={
            "lora_parameters": {"rank": 4, "scale": 10.0, "alpha": 16},
            "fine_tune_type": ...,
            "num_layers": ...,
            "lora_layers": 2,
        },
        format="mlx",
    ),
    Case(
        "MLX without its parameters",
        ("lora_parameters: is None, expected a table of rank, scale and keys",),
        "bad-field",
        config={"lora_parameters": None},
        format="mlx",
    ),
    Case(
        "MLX with keys that are no names",
        ("lora_parameters.keys: is 'q_proj', expected a list of names",),
        "bad-field",
        config={"lora_parameters": {"rank": 4, "scale": 1.5, "keys": "q_proj"}},
        format="mlx",
    ),
    Case(
        "MLX without a number of layers",
        ("num_layers: is None, expected a whole number",),
        "bad-field",
        config={"num_layers": ...},
        format="mlx",
    ),
    Case(
        "MLX with tensors in more layers than were trained",
        ("num_layers: is 1, and the adapter has tensors in 2 layers",),
        "unmatched-target",
        config={"num_layers": 1},
        format="mlx",
    ),
    Case(
        "MLX that lost a layer",
        ("layers.0.mlp.down_proj: the config targets it, and the adapter has no tensors for it",),
        "missing-module",
        format="mlx",
        tensors=drop_all("layers.0."),
    ),
    Case(
        "MLX that lost its last layer",
        ("the config targets it, and the adapter has no tensors for it",),
        "missing-module",
        config={"num_layers": 0},
        format="mlx",
        tensors=drop_all("layers.1."),
    ),
    Case(
        "MLX that lost a module",
        ("layers.1.mlp.down_proj: the config targets it, and the adapter has no tensors for it",),
        "missing-module",
        format="mlx",
        tensors=drop_all("layers.1.mlp.down_proj"),
    ),
    Case(
        "MLX with a module that no key names",
        ("down_proj: the adapter has tensors for it, and lora_parameters.keys does not list it",),
        "unexpected-tensor",
        config={"lora_parameters": {"rank": 4, "scale": 1.5, "keys": ["self_attn.q_proj"]}},
        format="mlx",
    ),
    Case(
        "MLX with a key that the base has and the adapter lacks",
        ("lora_parameters.keys: the entry 'self_attn.k_proj' matches none of the adapter's 4 modules",),
        "unmatched-target",
        config={
            "lora_parameters": {
                "rank": 4,
                "scale": 1.5,
                "keys": ["self_attn.q_proj", "mlp.down_proj", "self_attn.k_proj"],
            }
        },
        format="mlx",
    ),
    Case(
        "MLX with another rank",
        ("has rank 4, the config says 8 (lora_parameters.rank)",),
        "rank-mismatch",
        config={"lora_parameters": {"rank": 8, "scale": 1.5}},
        format="mlx",
    ),
    Case(
        "MLX factors of two ranks",
        ("lora_a is (64, 4), lora_b is (3, 64), expected (in, r) and (r, out)",),
        "bad-shape",
        format="mlx",
        tensors=reshape(f"{MLX_Q}.lora_b", 3, 64),
    ),
    Case(
        "MLX factors of a pruned model",
        ("q_proj: lora_B is (48, 4), the base needs (64, 4)", "perhaps a pruned one"),
        "shape-mismatch",
        format="mlx",
        tensors=reshape(f"{MLX_Q}.lora_b", 4, 48),
    ),
    Case(
        "MLX factors of integers",
        ("lora_a: is stored as I64, expected BF16, F16 or F32",),
        "bad-dtype",
        format="mlx",
        tensors=to_dtype(f"{MLX_Q}.lora_a", "int64"),
    ),
    Case(
        "MLX without an a",
        ("q_proj: has lora_b and no lora_a",),
        "missing-A",
        format="mlx",
        tensors=drop(f"{MLX_Q}.lora_a"),
    ),
    Case(
        "MLX without a b",
        ("q_proj: has lora_a and no lora_b",),
        "missing-B",
        format="mlx",
        tensors=drop(f"{MLX_Q}.lora_b"),
    ),
    Case(
        "MLX with NaN",
        ("lora_b: has 1 NaN or infinite value",),
        "non-finite",
        format="mlx",
        tensors=fill(f"{MLX_Q}.lora_b", float("nan")),
    ),
    Case(
        "MLX DoRA without lengths",
        ("_proj: has no m, and fine_tune_type is 'dora'",),
        "missing-magnitude",
        config={"fine_tune_type": "dora"},
        format="mlx",
    ),
    Case(
        "MLX lengths without DoRA",
        ("q_proj: has DoRA's m, and fine_tune_type is not 'dora'",),
        "unexpected-tensor",
        format="mlx",
        tensors=add(f"{MLX_Q}.m", 64),
    ),
    Case(
        "MLX with a tensor of no kind",
        ("something.else: is not a tensor of an mlx-lm LoRA",),
        "unexpected-tensor",
        format="mlx",
        tensors=add("something.else", 2, 2),
    ),
    Case(
        "MLX factors as whole parameters",
        ("lora_a: is a LoRA factor, and fine_tune_type is 'full'",),
        "unexpected-tensor",
        config={"fine_tune_type": "full"},
        format="mlx",
    ),
    Case(
        "MLX with a kind of training of a later version",
        ("fine_tune_type: is 'warp', expected 'lora', 'dora' or 'full'",),
        "unsupported",
        config={"fine_tune_type": "warp"},
        format="mlx",
    ),
    Case(
        "MLX experts whose storage is not known",
        (
            "mlp.bank.up_proj: lora_a is (2, 4, 64), lora_b is (2, 80, 4): the way this model stores its experts",
        ),
        "unsupported",
        config={"lora_parameters": {"rank": 4, "scale": 1.5}},
        format="mlx",
        tensors=several(
            add("model.layers.0.mlp.bank.up_proj.lora_a", 2, 4, 64),
            add("model.layers.0.mlp.bank.up_proj.lora_b", 2, 80, 4),
        ),
    ),
    Case(
        "MLX DoRA on experts",
        ("mlp.switch_mlp.up_proj: is DoRA on stacked experts, which mlx-lm does not support",),
        "unsupported",
        config={"lora_parameters": {"rank": 4, "scale": 1.5}, "fine_tune_type": "dora"},
        format="mlx",
        tensors=several(
            add("model.layers.0.mlp.switch_mlp.up_proj.lora_a", 2, 4, 64),
            add("model.layers.0.mlp.switch_mlp.up_proj.lora_b", 2, 80, 4),
            add("model.layers.0.mlp.switch_mlp.up_proj.m", 2, 80),
        ),
    ),
    Case(
        "MLX on a family whose matrices it changes",
        ("model_type: is 'falcon_h1', and mlx-lm multiplies the weights by the config's multipliers",),
        "unsupported",
        format="mlx",
        base_config={"model_type": "falcon_h1"},
    ),
    Case(
        "MLX norms of a family to whose norms it adds 1",
        ("norm.weight: was trained in mlx-lm, which adds 1 to the norms of this family",),
        "unsupported",
        config={"fine_tune_type": "full"},
        format="mlx",
        tensors=several(drop_all("lora_"), add("model.norm.weight", 64)),
        base_config={"model_type": "qwen3_next"},
    ),
    # 4. sizes
    Case(
        "factors of a pruned model",
        (
            "layers.0.self_attn.q_proj: lora_B is (48, 4), the base needs (64, 4)",
            "check --base: the adapter was trained on another model, perhaps a pruned one",
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
        ("lora_A is (4, 64), lora_B is (64, 3)", "with the same rank"),
        "bad-shape",
        tensors=reshape(f"{Q}.lora_B.weight", 64, 3),
    ),
    Case("another rank in the config", ("has rank 4, the config says 8",), "rank-mismatch", config={"r": 8}),
    # 5. and 6. entries and patterns without a match
    Case(
        "a target that the base has and the adapter lacks",
        ("the entry 'k_proj' matches none of the adapter's 4 modules, and the base has it",),
        "unmatched-target",
        config={"target_modules": ["q_proj", "down_proj", "k_proj"]},
    ),
    Case(
        "a rank pattern that matches nothing",
        ("rank_pattern", "'k_proj' matches none of the adapter's 4 modules"),
        "unmatched-pattern",
        config={"rank_pattern": {"k_proj": 8}},
    ),
    Case(
        "an alpha pattern of one layer that the adapter lacks",
        ("alpha_pattern", r"'layers.1.*.k_proj' matches none"),
        "unmatched-pattern",
        config={"alpha_pattern": {"layers.1.*.k_proj": 8}},
    ),
    Case(
        "two patterns that disagree",
        ("alpha_pattern gives it several values", "keep only the right pattern"),
        "ambiguous-pattern",
        config={"alpha_pattern": {"q_proj": 8, r"layers.\d.self_attn.q_proj": 16}},
    ),
    # 7. fields
    Case(
        "a field of a later PEFT",
        ("warp_drive: is {'on': 1}, and PEFT 0.21 does not know this field",),
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
    Case("a rank of zero", ("r: is 0, expected a positive number",), "bad-field", config={"r": 0}),
    Case(
        "a rank pattern that is a list",
        ("rank_pattern", "expected a table of pattern → number"),
        "bad-field",
        config={"rank_pattern": [4]},
    ),
    Case(
        "a rank pattern that is no regular expression",
        ("rank_pattern", "is not a regular expression"),
        "bad-field",
        config={"rank_pattern": {"(q_proj": 4}},
    ),
    Case(
        "an alpha that is no number",
        ("alpha_pattern: gives 'q_proj' the value '8', expected a number",),
        "bad-field",
        config={"alpha_pattern": {"q_proj": "8"}},
    ),
    Case(
        "layers that are no numbers",
        ("layers_to_transform: is ['0'], expected a number or a list of numbers",),
        "bad-field",
        config={"layers_to_transform": ["0"]},
    ),
    Case(
        "targets that are no names",
        ("exclude_modules: is [1], expected a string or a list of strings",),
        "bad-field",
        config={"exclude_modules": [1]},
    ),
    # 8. whole parameters
    Case(
        "modules_to_save without a tensor",
        ("modules_to_save: has the entry 'lm_head', and no tensor in the file belongs to it",),
        "missing-module",
        config={"modules_to_save": ["lm_head"]},
    ),
    Case(
        "a trained weight that the config does not name",
        (
            "model.norm.weight: is a whole weight that differs from the base's",
            "the config does not list it as trained",
            "add its module to modules_to_save",
        ),
        "unexpected-tensor",
        tensors=several(
            add("base_model.model.model.norm.weight", 64), fill("base_model.model.model.norm.weight", 2.0)
        ),
    ),
    Case(
        "a trained bias that the config does not name",
        ("q_proj.bias: is a whole weight that differs", "the config does not list it as trained"),
        "unexpected-tensor",
        kind="LoRA with a bias (lora_bias)",
        family="llama_biased",
        tensors=add(f"{Q}.bias", 64),
    ),
    Case(
        "a trained weight that stands twice",
        ("lm_head.modules_to_save.weight: is a second weight of its module, and differs from",),
        "duplicate-tensor",
        config={"modules_to_save": ["lm_head"]},
        tensors=several(
            add(f"{HEAD}.weight", 96, 64),
            add(f"{HEAD}.modules_to_save.weight", 96, 64),
            double(f"{HEAD}.weight"),
        ),
    ),
    Case(
        "a trained module of another size",
        (
            "lm_head.weight: has the shape (80, 32), the base's lm_head.weight has (96, 64)",
            "trained on another model",
        ),
        "shape-mismatch",
        config={"modules_to_save": ["lm_head"]},
        tensors=add(f"{HEAD}.weight", 80, 32),
    ),
    Case(
        "a trained norm with more rows",
        ("model.norm.weight: has the shape (65), the base's model.norm.weight has (64)",),
        "shape-mismatch",
        config={"modules_to_save": ["model.norm"]},
        tensors=add("base_model.model.model.norm.weight", 65),
    ),
    Case(
        "an embedding saved along from another width",
        (
            "embed_tokens.base_layer.weight: has the shape (96, 32)",
            "the base's model.embed_tokens.weight has (96, 64)",
        ),
        "shape-mismatch",
        tensors=add(f"{EMBEDDING}.base_layer.weight", 96, 32),
    ),
    Case(
        "a trained module of integers",
        ("lm_head.weight: is stored as I64, the base's as BF16; expected BF16, F16 or F32",),
        "bad-dtype",
        config={"modules_to_save": ["lm_head"]},
        tensors=several(add(f"{HEAD}.weight", 96, 64), to_dtype(f"{HEAD}.weight", "int64")),
    ),
    Case(
        "a trained module by a half",
        (
            "lm_head.weight: replaces a whole parameter, so it cannot be scaled by the weight 0.5",
            "the weight 1",
        ),
        "weighted-replacement",
        config={"modules_to_save": ["lm_head"]},
        tensors=add(f"{HEAD}.weight", 96, 64),
        weight=":0.5",
    ),
    Case(
        "a trained head that the base does not have",
        (
            "score.weight: is a trained head, and the base has no head",
            "set task_type in adapter_config.json to what it was trained for: SEQ_CLS",
        ),
        "unmatched-module",
        config={"modules_to_save": ["score"]},
        tensors=add("base_model.model.score.weight", 2, 64),
    ),
    Case(
        "a classifier's adapter without its head",
        ("task_type: is SEQ_CLS, the adapter file has no head",),
        "no-head",
        config={"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"},
    ),
    Case(
        "a head of a class that loads nothing of the base",
        ("LlamaForQuestionAnswering: transformers would load none of the base's tensors",),
        "nothing-loaded",
        config={"modules_to_save": ["qa_outputs"], "task_type": "QUESTION_ANS"},
        tensors=several(
            add("base_model.model.qa_outputs.weight", 2, 64), add("base_model.model.qa_outputs.bias", 2)
        ),
    ),
    Case(
        "a trained module that the base does not have",
        ("vision_tower: the adapter changes this parameter, and the base has no vision_tower.weight",),
        "unmatched-module",
        config={"modules_to_save": ["vision_tower"]},
        tensors=add("base_model.model.vision_tower.weight", 2, 64),
    ),
    Case(
        "a vocabulary that grew at one end",
        (
            "lm_head.weight: has 96 rows, model.embed_tokens.weight grows to 100, and the adapter does not have the 4 new rows",
            "merge into the base that was resized before the training",
        ),
        "resized",
        kind="a larger vocabulary",
        tensors=drop(f"{HEAD}.weight"),
    ),
    Case(
        "a vocabulary that the config does not count",
        ("grows from 96 to 100 rows, and no vocab_size in config.json is 96", "resize the base"),
        "resized",
        kind="a larger vocabulary",
        base_config={"vocab_size": 95},
    ),
    # 9. biases
    Case(
        "biases that were trained and are not there",
        ("_proj.bias: the config says bias='all', and the adapter has no tensor for it",),
        "missing-bias",
        family="qwen2",
        config={"bias": "all"},
    ),
    Case(
        "biases of the adapted modules that are not there",
        ("q_proj.bias: the config says bias='lora_only'", "PEFT would keep the base's bias"),
        "missing-bias",
        family="qwen2",
        config={"bias": "lora_only"},
    ),
    Case(
        "biases of a kind that PEFT does not know",
        ("bias: is 'some', expected 'none', 'all' or 'lora_only'",),
        "bad-field",
        config={"bias": "some"},
    ),
    Case(
        "a lora_bias that is not there",
        ("_proj: has no bias of lora_B, and lora_bias is set", "PEFT would use zeros"),
        "missing-bias",
        config={"lora_bias": True},
    ),
    Case(
        "a bias of lora_B without lora_bias",
        (
            "q_proj: has a bias of lora_B, and lora_bias is not set",
            "PEFT would drop the tensor without a message",
        ),
        "unexpected-tensor",
        tensors=add(f"{Q}.lora_B.bias", 64),
    ),
    Case(
        "a bias of lora_B for a layer without a bias",
        ("the base has no model.layers.0.self_attn.q_proj.bias",),
        "unmatched-module",
        kind="LoRA with a bias (lora_bias)",
        family="llama_biased",
        base_tensors=drop("model.layers.0.self_attn.q_proj.bias"),
    ),
    Case(
        "a bias of lora_B of another size",
        ("lora_B.bias: has the shape (48), the base's model.layers.0.self_attn.q_proj.bias has (64)",),
        "shape-mismatch",
        kind="LoRA with a bias (lora_bias)",
        family="llama_biased",
        tensors=add(f"{Q}.lora_B.bias", 48),
    ),
    # 10. variants of LoRA
    Case(
        "use_dora without magnitudes",
        (
            "_proj: has no lora_magnitude_vector, and use_dora is set",
            "save or download the adapter again: its file is incomplete",
        ),
        "missing-magnitude",
        config={"use_dora": True},
    ),
    Case(
        "magnitudes without use_dora",
        (
            "q_proj: has a DoRA magnitude, and use_dora is not set",
            "PEFT would drop the tensor without a message",
        ),
        "unexpected-tensor",
        tensors=add(f"{Q}.lora_magnitude_vector", 64),
    ),
    Case(
        "a magnitude for every input",
        ("q_proj.lora_magnitude_vector", "has 48 values, expected 64, one per output"),
        "bad-shape",
        kind="DoRA on a linear layer",
        tensors=add(f"{Q}.lora_magnitude_vector", 48),
    ),
    Case(
        "KaSA's diagonal without KaSA",
        ("q_proj.lora_diag: is not a tensor of this kind of LoRA",),
        "unexpected-tensor",
        tensors=add(f"{Q}.lora_diag", 4),
    ),
    Case(
        "AdaLoRA's singular values in a LoRA",
        ("q_proj.lora_E: is not a tensor of this kind of LoRA",),
        "unexpected-tensor",
        tensors=add(f"{Q}.lora_E", 4, 1),
    ),
    Case(
        "half a pair of an embedding",
        ("embed_tokens: has lora_A and no lora_B",),
        "missing-B",
        tensors=add(f"{EMBEDDING}.lora_embedding_A", 4, 96),
    ),
    Case(
        "a number of blocks that is none",
        ("use_bdlora: has nblocks '2', expected a positive whole number",),
        "bad-field",
        kind="BD-LoRA",
        config={"use_bdlora": {"target_modules_bd_a": ["down_proj"], "nblocks": "2"}},
    ),
    Case(
        "blocks that do not share the rows",
        ("q_proj: lora_B is (64, 2), expected rows for 3 blocks (use_bdlora)",),
        "bad-shape",
        kind="BD-LoRA",
        config={"use_bdlora": {"target_modules_bd_b": ["q_proj"], "nblocks": 3}},
    ),
    # 11. AdaLoRA
    *(
        Case(
            f"AdaLoRA without its {role}",
            (f"q_proj: has no lora_{role}", "save or download the adapter again: its file is incomplete"),
            f"missing-{role}",
            kind="AdaLoRA",
            tensors=drop(f"{Q}.lora_{role}"),
        )
        for role in "ABE"
    ),
    Case(
        "AdaLoRA with too few singular values",
        ("lora_A is (6, 64), lora_B is (64, 6), lora_E is (5, 1)", "with the same rank r"),
        "bad-shape",
        kind="AdaLoRA",
        tensors=add(f"{Q}.lora_E", 5, 1),
    ),
    Case(
        "AdaLoRA with another first rank",
        ("has rank 6, the config says 7 (rank_pattern and init_r)",),
        "rank-mismatch",
        kind="AdaLoRA",
        config={"init_r": 7},
    ),
    Case(
        "AdaLoRA whose pattern left another rank",
        ("q_proj: has rank 6, the config says 2 (rank_pattern and init_r)",),
        "rank-mismatch",
        kind="AdaLoRA",
        config={
            "rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True] + [False] * 3}
        },
    ),
    Case(
        "AdaLoRA with a pattern of LoRA",
        ("rank_pattern: is {'q_proj': 4}, expected a table of module → list of booleans",),
        "bad-field",
        kind="AdaLoRA",
        config={"rank_pattern": {"q_proj": 4}},
    ),
    Case(
        "AdaLoRA with a first rank of zero",
        ("init_r: is 0, expected a positive number",),
        "bad-field",
        kind="AdaLoRA",
        config={"init_r": 0},
    ),
    # trained tokens
    Case(
        "fewer tokens than rows",
        ("has 3 rows, and trainable_token_indices names 2 tokens for it",),
        "token-mismatch",
        kind="trainable_token_indices",
        config={"trainable_token_indices": [1, 17]},
    ),
    Case(
        "a token that stands twice",
        ("has 3 rows, and trainable_token_indices names 2 tokens for it",),
        "token-mismatch",
        kind="trainable_token_indices",
        config={"trainable_token_indices": [1, 17, 17]},
    ),
    Case(
        "tokens of another embedding",
        ("has 3 rows, and trainable_token_indices names no tokens for it",),
        "token-mismatch",
        kind="trainable_token_indices",
        config={"trainable_token_indices": {"wte": [1, 17, 80]}},
    ),
    Case(
        "tokens beyond the vocabulary",
        (
            "has a row for token 96, and the base's model.embed_tokens.weight has only 96 rows",
            "merge into the base that was resized before the training",
        ),
        "token-mismatch",
        kind="trainable_token_indices",
        config={"trainable_token_indices": [1, 17, 96]},
    ),
    Case(
        "tokens before the vocabulary",
        ("has a row for token -1, and the base's model.embed_tokens.weight has only 96 rows",),
        "token-mismatch",
        kind="trainable tokens alone",
        config={"token_indices": [1, 17, -1]},
    ),
    Case(
        "tokens without rows",
        ("trainable_token_indices: the file has no trained rows for it",),
        "missing-tokens",
        config={"trainable_token_indices": [1, 17, 80]},
    ),
    Case(
        "tokens that are a number",
        ("trainable_token_indices: is 5, expected a list or a table",),
        "bad-field",
        config={"trainable_token_indices": 5},
    ),
    Case(
        "rows of another width",
        ("trainable_tokens_delta: has the shape (3, 48), the base's model.embed_tokens.weight has (96, 64)",),
        "shape-mismatch",
        kind="trainable_token_indices",
        tensors=add(f"{EMBEDDING}.token_adapter.trainable_tokens_delta", 3, 48),
    ),
    # parameters by their names
    square_case("square experts of an unknown PEFT", None),
    square_case("square experts of the PEFT in dispute", "0.19.0"),
    square_case(
        "square experts of a model without a class",
        "0.21.2",
        architectures=["SomebodysModel"],
        model_type="no",
    ),
    Case(
        "a parameter that the base has and the adapter lacks",
        ("target_parameters: the entry 'k_proj.weight' matches none of the adapter's tensors",),
        "unmatched-target",
        config={"target_parameters": ["k_proj.weight"]},
    ),
    Case(
        "a parameter that the module does not have",
        ("the adapter changes this parameter, and the base has no model.layers.0.mlp.experts.up_down_proj",),
        "unmatched-module",
        kind=ONE_PARAMETER,
        family="qwen3_moe",
        config={"target_parameters": ["experts.up_down_proj"]},
    ),
    Case(
        "two parameters of a model without a class",
        (
            "mlp.experts: has LoRA on several parameters, and only the model's code shows which pair belongs to which parameter",
        ),
        "unsupported",
        kind=TWO_PARAMETERS,
        family="qwen3_moe",
        base_config={"architectures": ["SomebodysModel"], "model_type": "no"},
    ),
    Case(
        "a rank that the experts cannot share",
        ("lora_A is (14, 40), lora_B is (64, 14), the parameter is (4, 64, 40)",),
        "shape-mismatch",
        kind=ONE_PARAMETER,
        family="qwen3_moe",
        tensors=several(add(f"{EXPERTS}.lora_A.weight", 14, 40), add(f"{EXPERTS}.lora_B.weight", 64, 14)),
    ),
    Case(
        "factors for experts of another size",
        ("lora_A is (16, 48), lora_B is (64, 16), the parameter is (4, 64, 40)", "trained on another model"),
        "shape-mismatch",
        kind=ONE_PARAMETER,
        family="qwen3_moe",
        tensors=add(f"{EXPERTS}.lora_A.weight", 16, 48),
    ),
    Case(
        "experts without a B",
        ("experts: has lora_A and no lora_B",),
        "missing-B",
        kind=ONE_PARAMETER,
        family="qwen3_moe",
        tensors=drop(f"{EXPERTS}.lora_B.weight"),
    ),
    # convolutions
    Case(
        "factors of a convolution for a linear layer",
        ("q_proj.weight: has the shape (64, 64) in the base, expected a convolution",),
        "shape-mismatch",
        tensors=several(reshape(f"{Q}.lora_A.weight", 4, 64, 1), reshape(f"{Q}.lora_B.weight", 64, 4, 1)),
    ),
    Case(
        "factors of a linear layer for a convolution",
        ("convolution.weight: has the shape (8, 8, 3, 3) in the base, expected a linear weight [out, in]",),
        "shape-mismatch",
        kind="LoRA on Conv2d",
        family="resnet",
        tensors=several(
            reshape(f"{CONVOLUTION}.lora_A.weight", 4, 8), reshape(f"{CONVOLUTION}.lora_B.weight", 8, 4)
        ),
    ),
    Case(
        "a grouped convolution",
        (
            "is a grouped convolution, (8, 8, 3, 3), which a LoRA cannot express; its adapter is (8, 16, 3, 3)",
            "serve the adapter in the library that trained it; PEFT cannot merge it either",
        ),
        "unsupported",
        kind="LoRA on Conv2d",
        family="resnet",
        tensors=reshape(f"{CONVOLUTION}.lora_A.weight", 4, 16, 3, 3),
    ),
    Case(
        "a convolution of another kernel",
        ("lora_A is (4, 8, 5, 5), the base needs (4, 8, 3, 3)",),
        "shape-mismatch",
        kind="LoRA on Conv2d",
        family="resnet",
        tensors=reshape(f"{CONVOLUTION}.lora_A.weight", 4, 8, 5, 5),
    ),
    # 12. values
    Case(
        "NaN",
        ("q_proj.lora_B.weight: has 1 NaN or infinite value",),
        "non-finite",
        tensors=fill(f"{Q}.lora_B.weight", float("nan")),
    ),
    Case(
        "infinity",
        ("has 1 NaN or infinite value",),
        "non-finite",
        tensors=fill(f"{Q}.lora_A.weight", float("-inf")),
    ),
    Case(
        "NaN in a method that PEFT's layers merge",
        ("hada_w1_a: has 1 NaN or infinite value",),
        "non-finite",
        kind="LoHa",
        tensors=fill(f"{Q}.hada_w1_a", float("nan")),
    ),
    # 14. and 15. bases that change
    *(
        Case(
            f"{name} on an unknown base",
            (f"init_lora_weights: is '{init}': {name} changed the base's weights", "--base-is residual"),
            "base-is",
            config={"init_lora_weights": init},
        )
        for init, name in MUTATING_INITS.items()
    ),
    *(
        Case(
            f"{init} on the original base",
            (f"is '{init}', and {name}'s change of the original base cannot be computed again: {why}",),
            "base-is",
            config={"init_lora_weights": init},
            options=("--base-is", "original"),
        )
        for init, name, why in [
            ("pissa_niter_4", "PiSSA", "its decomposition used random numbers"),
            ("corda", "CorDA", "it depends on the calibration data"),
            ("loftq", "LoftQ", "it depends on how the base was quantised"),
            ("lora_ga", "LoRA-GA", "it depends on gradients of the first training steps"),
        ]
    ),
    Case(
        "an initialisation of a later PEFT",
        ("init_lora_weights: is 'warp', which PEFT 0.21 does not know",),
        "unsupported",
        config={"init_lora_weights": "warp"},
    ),
    *(
        Case(
            f"{name} without a word about it",
            (f"peft_type: {name} decomposes the base's weights when it is loaded", "pass --allow-svd"),
            "decomposes",
            config={"peft_type": kind},
        )
        for kind, name in DECOMPOSING.items()
    ),
    Case(
        "layers repeated beyond the model",
        ("layer_replication: is [[0, 3]], and the base has 2 layers",),
        "bad-field",
        config={"layer_replication": [[0, 3]]},
    ),
    Case(
        "layers repeated in a wrong way",
        ("layer_replication: is [0, 2], expected a list of [start, end]",),
        "bad-field",
        config={"layer_replication": [0, 2]},
    ),
    Case(
        "layers repeated in a model without any",
        (
            "layer_replication: the adapter repeats layers, and the names of the base's tensors do not show which layer they belong to",
        ),
        "unsupported",
        config={"layer_replication": [[0, 2]]},
        base_tensors=rename("layers.", "floors-"),
        base_config={"num_hidden_layers": 2},
    ),
    # kinds without a merged form
    *(
        Case(
            f"the field {name}",
            (f"{name}: {why}, so it cannot be merged", "serve the adapter with PEFT, unmerged"),
            "unsupported",
            config={name: [1]},
        )
        for name, why in UNMERGEABLE_FIELDS.items()
    ),
    *(
        Case(
            f"the type {kind}",
            (
                f"a {kind} adapter cannot be merged: {why}, which weights cannot express",
                "serve the adapter with PEFT, unmerged",
            ),
            "unsupported",
            config={"peft_type": kind},
        )
        for kind, why in NOT_IN_WEIGHTS.items()
    ),
    Case(
        "BONE",
        ("peft_type: 'BONE' was renamed, and PEFT 0.21 cannot read it", "save it again as MISS"),
        "unsupported",
        config={"peft_type": "BONE"},
    ),
    Case(
        "parts of a fused projection",
        ("enable_lora: each LoRA changes only parts of a fused projection", "merge it with PEFT 0.2"),
        "unsupported",
        config={"enable_lora": [True, False, True]},
    ),
    Case(
        "a type of a later PEFT",
        ("peft_type: is 'WARP', which is not a type of PEFT 0.21",),
        "unsupported",
        config={"peft_type": "WARP"},
    ),
    Case(
        "no type",
        ("peft_type: is missing, so adapter_config.json is not PEFT's",),
        "unsupported",
        config={"peft_type": ...},
    ),
    # what PEFT's own layers merge
    Case(
        "a tensor of LoHa that is not there",
        ("q_proj.hada_w2_b: is not in the adapter; PEFT would use a random value",),
        "injection",
        kind="LoHa",
        tensors=drop(f"{Q}.hada_w2_b"),
    ),
    Case(
        "a tensor that LoHa does not have",
        ("q_proj.hada_w3_a: LOHA does not use it in this module",),
        "injection",
        kind="LoHa",
        tensors=add(f"{Q}.hada_w3_a", 4, 4),
    ),
    Case(
        "a tensor of LoHa of another size",
        ("q_proj.hada_w1_a: shape [48, 4], expected [64, 4]",),
        "injection",
        kind="LoHa",
        tensors=add(f"{Q}.hada_w1_a", 48, 4),
    ),
    Case(
        "a module of LoHa that is not there",
        ("layers.0.self_attn.q_proj: the config targets it, and the adapter has no tensors for it",),
        "missing-module",
        kind="LoHa",
        tensors=drop_all("layers.0.self_attn.q_proj."),
    ),
    Case(
        "a module of LoHa that the config does not target",
        ("layers.0.self_attn.q_proj.hada_w1_a: has tensors, and the config targets no such module",),
        "unexpected-tensor",
        kind="LoHa",
        config={"target_modules": ["v_proj", "down_proj"]},
    ),
    Case(
        "LoHa without PEFT's prefix",
        ("tensors do not have the prefix base_model.model.",),
        "wrong-prefix",
        kind="LoHa",
        tensors=rename("base_model.model.", ""),
    ),
    Case(
        "LoHa on a weight that the base lacks",
        (
            "layers.0.self_attn.q_proj: the adapter changes this parameter, and the base has no model.layers.0",
        ),
        "unmatched-module",
        kind="LoHa",
        base_tensors=drop("model.layers.0.self_attn.q_proj.weight"),
    ),
    Case(
        "LoHa on a weight in float64",
        ("q_proj.weight: is stored as F64, expected BF16, F16 or F32",),
        "unsupported",
        kind="LoHa",
        base_tensors=to_dtype("model.layers.0.self_attn.q_proj.weight", "float64"),
    ),
    Case(
        "LoHa on a weight of another size",
        ("q_proj.weight: shape [32, 64], expected [64, 64]",),
        "injection",
        kind="LoHa",
        base_tensors=reshape("model.layers.0.self_attn.q_proj.weight", 32, 64),
    ),
    Case(
        "LoHa on a model without a class",
        ("model_type: the installed transformers does not know strange",),
        "injection",
        kind="LoHa",
        base_config={"model_type": "strange"},
    ),
    Case(
        "LoHa on a model whose class is somebody's own",
        ("architectures: the installed transformers does not know SomebodysModel",),
        "injection",
        kind="LoHa",
        base_config={"architectures": ["SomebodysModel"]},
    ),
    Case(
        "LoHa with a rank that PEFT refuses",
        ("PEFT raises ValueError: `r` should be a positive integer value",),
        "injection",
        kind="LoHa",
        config={"r": -1},
    ),
    Case(
        "LoHa with modules_to_save and no tensor",
        ("modules_to_save: has the entry 'lm_head', and no tensor in the file belongs to it",),
        "missing-module",
        kind="LoHa",
        config={"modules_to_save": ["lm_head"]},
    ),
    Case(
        "LoHa by a rank that it does not have",
        (
            "--combine svd keeps the largest rank of the adapters, and no adapter that changes this weight has a rank",
        ),
        "no-rank",
        kind="LoHa",
        options=("--combine", "svd"),
    ),
    Case(
        "FRoD without its projections",
        ("save_projection: is false, and computing FRoD's projections again needs all weights at once",),
        "injection",
        kind="FRoD",
        config={"save_projection": False},
    ),
    Case(
        "FRoD that lost a projection",
        ("frod_V", "is not in the adapter"),
        "injection",
        kind="FRoD",
        tensors=drop_all("frod_V"),
    ),
    Case(
        "OFT on a larger kernel",
        ("layer.1.convolution: OFT on a convolution with kernel (3, 3) cannot be merged",),
        "unsupported",
        kind="OFT on a 3×3 convolution",
        family="resnet",
    ),
    Case(
        "a weight that is computed",
        (
            "pos_conv_embed.conv: its weight is computed from other tensors (weight_norm)",
            "serve the adapter with PEFT, unmerged",
        ),
        "unsupported",
        kind="LoHa under weight_norm",
        family="wav2vec2",
    ),
    # ties that cannot be taken apart
    *(
        Case(
            f"one end of a tied {family}",
            ("lm_head.weight: differs from", "the base stores one tensor for both", why, "--allow-untie"),
            "untie",
            kind=f"LoRA on one end of {family}",
            family=family.lower(),
        )
        for family, why in [
            ("Gemma", "engines tie the embeddings of gemma regardless of the config"),
            ("Cohere", "engines tie the embeddings of cohere regardless of the config"),
            ("T5", "t5 scales its output when the config says that embeddings are tied"),
        ]
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
        ("quantization_config: the base is stored quantised with HQQ", "full-precision parent"),
        "unsupported",
        base_config={"quantization_config": {"quant_method": "hqq"}},
    ),
    Case(
        "a base that says it is quantised, and is not",
        ("says that weights are quantised (fp8), but no weight is", "remove quantization_config"),
        "quantised",
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


@pytest.fixture
def inputs(workshop, pico, pico_adapter, tampered):
    """Return a function: case → copies of a base and an adapter, with its changes made."""

    def make(case):
        if case.kind:
            known = {kind.name: kind for kind in KINDS} | OTHER_KINDS
            built = building.case(workshop, known[case.kind], case.family, "bfloat16")
            sources = built.base, built.adapter
        else:
            sources = pico(case.family), pico_adapter(pico(case.family))
        base, adapter = tampered(sources[0], "base"), tampered(sources[1], "adapter")
        edit_json(base / "config.json", **case.base_config)
        if case.base_tensors:
            edit_tensors(base / "model.safetensors", case.base_tensors)
        if case.format:
            twins.replace_by(adapter, case.format)
        edit_json(adapter / "adapter_config.json", **case.config)
        if case.tensors:
            edit_tensors(adapter / twins.WEIGHTS.get(case.format, "adapter_model.safetensors"), case.tensors)
        if case.beside:
            case.beside(adapter)
        return base, adapter

    return make


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_disagreement_is_refused_with_its_own_sentence(case, inputs, cli, tmp_path):
    base, adapter = inputs(case)

    result = cli(
        "--base", base, "--adapter", f"{adapter}{case.weight}", "--out", tmp_path / "out", "--json", *case.options
    )  # fmt: skip

    assert result.exit_code == exits.PLAN, result.stderr
    issues = json.loads(result.stdout)["issues"]
    said = result.stderr + "\n".join("{subject}: {sentence} ({hint})".format(**issue) for issue in issues)
    for words in case.says:
        assert words in said
    assert case.code in {issue["code"] for issue in issues}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_the_cases_change_is_what_they_are_refused_for(inputs, cli, tmp_path):
    what = sorted({(case.kind, case.family, case.format) for case in CASES})
    for number, (kind, family, adapter_format) in enumerate(what):
        if kind in OTHER_KINDS:
            continue
        at = tmp_path / str(number)
        at.mkdir()
        base, adapter = inputs(Case("unchanged", (), "", kind=kind, family=family, format=adapter_format))
        result = cli("--base", base, "--adapter", adapter, "--out", at / "out", "--no-verify")
        assert result.exit_code == exits.OK, result.stderr
        for copied in (base, adapter):
            shutil.rmtree(copied)


SOURCES = [
    path
    for place in ("adapters", "planning", "peft_rules")
    for path in sorted((ROOT / "lora_merge" / place).rglob("*.py"))
]
SEVERAL = {"two-replacements"}
"""Codes of refusals that take several adapters; they have tests of their own below."""

IN_TEST_MERGE = {"merged-before"}
IN_TEST_ODD_HEADS = {"stored-copy"}

IN_TEST_RESOLVE = {"empty"}
IN_TEST_OTHER_SIZE = {"other-size"}


def test_every_code_of_a_refusal_has_a_case():
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    codes = set(re.findall(r'\berror\(\s*"([a-z-]+)"', text))
    assert len(codes) >= 25
    assert (
        codes - {case.code for case in CASES}
        == SEVERAL | IN_TEST_RESOLVE | IN_TEST_OTHER_SIZE | IN_TEST_ODD_HEADS | IN_TEST_MERGE
    )


def test_two_adapters_cannot_replace_one_parameter(pico, pico_adapter, tampered, cli, tmp_path):
    adapters = [tampered(pico_adapter(pico()), name) for name in ("one", "other")]
    for adapter in adapters:
        edit_json(adapter / "adapter_config.json", modules_to_save=["lm_head"])
        edit_tensors(adapter / "adapter_model.safetensors", add(f"{HEAD}.weight", 96, 64))

    result = cli(
        "--base", pico(), "--adapter", adapters[0], "--adapter", adapters[1], "--out", tmp_path / "out", "--json"
    )  # fmt: skip

    assert result.exit_code == exits.PLAN
    assert (
        "lm_head.weight: two adapters replace this parameter as a whole\nhint: merge only one of them"
        in result.stderr
    )
    assert "two-replacements" in {issue["code"] for issue in json.loads(result.stdout)["issues"]}
    assert not (tmp_path / "out").exists()


def test_adapters_of_differently_repeated_layers_are_refused(pico, pico_adapter, tampered, cli, tmp_path):
    repeated = tampered(pico_adapter(pico()), "repeated")
    edit_json(repeated / "adapter_config.json", layer_replication=[[0, 2], [1, 2]])

    result = cli(
        "--base", pico(), "--adapter", repeated, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out"
    )

    assert result.exit_code == exits.PLAN
    assert "layer_replication: the adapters need different layers" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_problem_of_any_adapter_stops_the_merge_of_all(pico, pico_adapter, tampered, cli, tmp_path):
    broken = tampered(pico_adapter(pico()), "broken")
    edit_json(broken / "adapter_config.json", r=8)

    result = cli(
        "--base", pico(), "--adapter", pico_adapter(pico()), "--adapter", broken, "--out", tmp_path / "out"
    )

    assert result.exit_code == exits.PLAN
    assert "has rank 4, the config says 8" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("value", "words"), [("new", "'new' is not a known kind of base, expected original or residual")]
)
def test_a_wrong_word_about_the_base_is_usage(value, words, pico, pico_adapter, cli, tmp_path):
    result = cli(
        "--base", pico(), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out", "--base-is", value
    )

    assert result.exit_code == exits.USAGE
    assert words in result.stderr


def test_every_problem_is_named_in_one_message(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", warp_drive=True, rank_pattern={"k_proj": 2})
    edit_tensors(
        adapter / "adapter_model.safetensors",
        several(drop(f"{Q}.lora_B.weight"), reshape(f"{LAYER}.mlp.down_proj.lora_A.weight", 4, 48)),
    )

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert "4 problems" in result.stderr
    for words in ("warp_drive", "'k_proj' matches none", "no lora_B", "lora_A is (4, 48)"):
        assert words in result.stderr


def test_a_rank_that_disagrees_hides_no_other_problem(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", r=8, target_modules=["q_proj", "k_proj"])

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    for words in ("has rank 4, the config says 8", "the entry 'k_proj'", "target_modules does not match it"):
        assert words in result.stderr


def test_the_same_problem_in_many_modules_is_one_line(pico, pico_adapter, tampered, cli, tmp_path):
    adapter = tampered(pico_adapter(pico()))
    edit_json(adapter / "adapter_config.json", r=8)

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert "4 problems" in result.stderr
    assert "model.layers.{0-1}.self_attn.q_proj" in result.stderr
    assert "; 4 times" in result.stderr
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


def test_adalora_whose_ranks_never_moved_is_a_warning_and_strict_refuses_it(workshop, cli, tmp_path):
    kind = next(kind for kind in KINDS if kind.name == "AdaLoRA")
    case = building.case(workshop, kind, "llama", "bfloat16")
    arguments = ("--base", case.base, "--adapter", case.adapter, "--out", tmp_path / "out")

    strict = cli(*arguments, "--strict")
    assert strict.exit_code == exits.PLAN
    assert list(tmp_path.iterdir()) == []

    merged = cli(*arguments)
    assert merged.exit_code == exits.OK, merged.stderr
    for result in (strict, merged):
        assert "rank_pattern: every module still has its initial rank, init_r = 6" in result.stderr
        assert "update_and_allocate()" in result.stderr


def test_adalora_whose_ranks_were_reduced_is_none(workshop, cli, tmp_path):
    kind = next(kind for kind in KINDS if kind.name == "AdaLoRA after its ranks were reduced")
    case = building.case(workshop, kind, "llama", "float32")

    result = cli("--base", case.base, "--adapter", case.adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.OK, result.stderr
    assert "AdaLoRA pruned this module to rank 0, so it does not change" in result.stderr


@pytest.fixture
def faint(pico, pico_adapter, tampered):
    """A base with weights of 0.02 and an adapter whose deltas have a standard deviation of 1e-4."""
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")

    def scale_weights(tensors):
        import torch

        generator = torch.Generator().manual_seed(0)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                tensors[name] = (torch.randn(tensor.shape, generator=generator) * 0.02).bfloat16()

    def scale_factors(tensors):
        import torch

        generator = torch.Generator().manual_seed(1)
        # a sum of 4 products with standard deviations of 1 and σ, times the scale of 1.5, has one of 3σ
        for name, tensor in tensors.items():
            size = 1.0 if "lora_A" in name else 1e-4 / 3
            tensors[name] = torch.randn(tensor.shape, generator=generator) * size

    edit_tensors(base / "model.safetensors", scale_weights)
    edit_tensors(adapter / "adapter_model.safetensors", scale_factors)
    return base, adapter


def test_a_delta_that_drowns_in_the_stored_dtype_is_a_warning_that_says_how_much_of_it(faint, cli, tmp_path):
    base, adapter = faint

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")

    assert result.exit_code == exits.OK, result.stderr
    (issue,) = [issue for issue in json.loads(result.stdout)["issues"] if issue["code"] == "delta-drowns"]
    assert issue["severity"] == "warning"
    share = int(re.match(r"(\d+)% of the delta's elements are too small", issue["sentence"])[1])
    assert share == pytest.approx(
        drowned_share(base, adapter), abs=4
    )  # the worst tensor, and by a sample of it
    assert 25 < share < 40
    assert "4 of 4 merged tensors lose more than 25%" in issue["sentence"]
    assert "--dtype float32" in issue["hint"]
    assert f"warning: {issue['subject']}" in result.stderr


def drowned_share(base, adapter):
    """Return the percentage of the elements that bfloat16 leaves as they were, in the worst of the tensors."""
    from safetensors.torch import load_file

    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    shares = []
    for name in [name for name in factors if "lora_A" in name]:
        weight = weights[name.removeprefix("base_model.model.").replace("lora_A.", "")]
        delta = 1.5 * factors[name.replace("lora_A", "lora_B")] @ factors[name]
        shares.append(float(((weight.float() + delta).bfloat16() == weight).double().mean()))
    return 100 * max(shares)


def test_a_delta_does_not_drown_in_float32(faint, cli, tmp_path):
    base, adapter = faint

    result = cli(
        "--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--dtype", "float32", "--strict"
    )

    assert result.exit_code == exits.OK, result.stderr
    assert "too small" not in result.stderr


def test_strict_refuses_a_delta_that_drowns_and_leaves_nothing(faint, cli, tmp_path):
    base, adapter = faint

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--strict")

    assert result.exit_code == exits.PLAN
    assert "of the delta's elements are too small for the stored dtype" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
