"""The models and adapters that the pictures are of: small, real, and always the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "lora_merge")

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_ADAPTERS: dict[str, dict[str, Any]] = {
    "my-lora": {"r": 16},
    "my-dora": {"r": 8, "use_dora": True},
    "style": {"r": 32, "target_modules": ["q_proj", "v_proj"]},
    "facts": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
}
_N_RUNS = 24
"""Adapters of a batch that is longer than a terminal."""


def environ() -> dict[str, str]:
    """Return the variables with which the program of this tree runs, off-line."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(root: Path, *words: str) -> None:
    """Run the command in the workshop, quietly; raise an error where it fails."""
    subprocess.run([*PROGRAM, *words, "-q"], cwd=root, env=os.environ | environ(), check=True)


def build(root: Path) -> None:
    """Make everything that the scenes need."""
    _model(root / "base", n_layers=12)
    _model(root / "small-base", hidden_size=512, n_layers=4)
    for name, fields in _ADAPTERS.items():
        _adapter(root / "base", root / name, fields)
    _adapter(root / "small-base", root / "small-lora", {"r": 16})
    for n in range(1, _N_RUNS + 1):
        _varied(root / "small-lora", root / f"runs/checkpoint-{n * 100}", 1 + n / _N_RUNS)
    run(root, "--base", "base", "--adapter", "my-lora", "--out", "finetuned", "--no-verify")
    run(root, "--base", "base", "--adapter", "facts", "--out", "base-fp8", "--quantize", "fp8", "--no-verify")
    # A quantised base of its own, without the sign that an adapter is in it already.
    (root / "base-fp8" / "merge_manifest.json").unlink()
    (root / "README.md").write_text("not a model\n")
    jobs = [{"base": "small-base", "adapter": "runs/checkpoint-*", "out": "out/{1}"}]
    (root / "batch.yaml").write_text(json.dumps({"jobs": jobs}))
    mixed = [
        {"adapter": "my-lora", "out": "out/my-lora"},
        {"adapter": "my-dora", "out": "out/my-dora"},
        {"adapter": "small-lora", "out": "out/small-lora"},
        {"convert": "style", "for": "vllm", "rank": 16, "out": "out/style-16"},
    ]
    (root / "mixed.yaml").write_text(json.dumps({"defaults": {"base": "base"}, "jobs": mixed}))


def _varied(adapter: Path, root: Path, factor: float) -> None:
    """Copy an adapter with every B multiplied by a factor."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapter, root)
    file = root / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: one * factor if "lora_B" in name else one for name, one in tensors.items()}, file)


def _model(root: Path, *, n_layers: int, hidden_size: int = 1024) -> None:
    import torch
    import transformers

    torch.manual_seed(hidden_size)
    config = transformers.LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 11 // 4,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=4,
        vocab_size=16_000,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root, max_shard_size="200MB")
    _tokenizer(root)


def _tokenizer(root: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(997))]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
    fast.save_pretrained(root)


def _adapter(base: Path, root: Path, fields: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = {"lora_alpha": 32, "target_modules": _TARGETS, "task_type": "CAUSAL_LM", **fields}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), LoraConfig(**settings)
    )
    torch.manual_seed(sum(root.name.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.02)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(root)
