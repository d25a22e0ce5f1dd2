"""A directory with everything that the documentation names: bases, adapters, batch files, all of them tiny and real.

One model and one adapter of each kind are built; the names that pages use lead to copies of them.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from click.testing import CliRunner, Result

ROOT = Path(__file__).resolve().parents[2]

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
"""Every matrix has blocks of 128 × 128, as FP8 needs."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

BASES = ("base", ".demo/base", "models/Llama-3-8B", "Llama-3-8B", "Qwen3-8B", "Qwen2.5-7B", "Qwen/Qwen3-8B")
QUANTISED = ("Qwen3-8B-FP8", "Qwen/Qwen3-8B-FP8", "Qwen3-8B-bnb-4bit")
"""FP8 in blocks, all of them: a page's name for a copy tells how a user's is stored, and no command depends on it."""

ADAPTERS = (
    "my-lora",
    "my-rl-lora",
    "my-qlora",
    "style",
    "facts",
    "lora_model",
    "adapter",
    ".demo/adapter",
    "outputs/lora-out",
    "saves/qwen3-8b/lora/sft",
    "output/v0-20260101-120000/checkpoint-500",
    "Qwen3-8B-SFT",
    "Qwen3-8B-SFT/checkpoint-100",
    "Qwen3-8B-SFT/checkpoint-200",
    "runs/style",
    "runs/style/checkpoint-100",
    "runs/style/checkpoint-200",
    "runs/facts/checkpoint-100",
    "runs/my-lora/checkpoint-500",
    "runs/other-lora/checkpoint-500",
)
NAMED_BASE = "Llama-3-8B"
"""What the adapters name as their base."""


def build(root: Path) -> None:
    """Fill a directory; it is copied for each page. Commands name everything relative to it."""
    base, adapter = root / BASES[0], root / ADAPTERS[0]
    _write_base(base)
    _write_adapter(base, adapter, seed=7)
    other = root / "unnamed"
    _write_adapter(base, other, seed=8)
    _run(root, "--base", BASES[0], "--adapter", "unnamed", "--out", QUANTISED[0], "--quantize", "fp8")
    _run(root, "--base", BASES[0], "--adapter", "unnamed", "--out", "my-model")
    for names in (BASES, QUANTISED, ADAPTERS):
        for name in names[1:]:
            shutil.copytree(root / names[0], root / name, dirs_exist_ok=True)
    _run(
        root, "convert", ADAPTERS[0], "--base", BASES[0], "--format", "mlx", "--out", "adapters"
    )  # fmt: skip
    shutil.copytree(ROOT / "configs", root / "configs")


def _write_base(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import write_tokenizer

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder)


def _write_adapter(base: Path, folder: Path, *, seed: int) -> None:
    """Write a LoRA of rank 32 that changes weights by about a tenth."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=32, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.005)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text()) | {"base_model_name_or_path": NAMED_BASE}
    path.write_text(json.dumps(saved))


def run(arguments: list[str]) -> Result:
    """Run the real command in this process and this directory."""
    from lora_merge.cli import main

    return CliRunner().invoke(main, arguments, prog_name="lora-merge")


def _run(root: Path, *arguments: str) -> None:
    before = Path.cwd()
    os.chdir(root)
    try:
        done = run(list(arguments))
    finally:
        os.chdir(before)
    assert done.exit_code == 0, done.output
