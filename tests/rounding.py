"""Adapters for quantised fixtures, and outputs of every storage and rounding with the evidence of how they were made."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.checks import Evidence
from lora_merge.formats.weights import values_of
from tests.filling import fill
from tests.storages.reference import LINEAR, weights_of

if TYPE_CHECKING:
    from pathlib import Path

SHARE = 0.03
"""Standard deviation of a change, of that of the weight: less than a step of four bits."""


def adapter_for(base: Path, root: Path, rank: int = 4, share: float = SHARE) -> Path:
    """Write a LoRA adapter for every linear layer of a checkpoint, with random factors."""
    root.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    tensors: dict[str, torch.Tensor] = {}
    targets = set()
    for name, weight in weights_of(base).items():
        module = name.removesuffix(".weight")
        last = module.rpartition(".")[2]
        if last in LINEAR and len(weight.shape) == 2 and ".experts." not in name:
            n_out, n_in = weight.shape
            std = share * float(values_of(weight).std()) / rank**0.5
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n_out, rank, generator=generator) * std
            targets.add(last)
    save_file(tensors, root / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(targets)}
    (root / "adapter_config.json").write_text(json.dumps(config))
    return root


def evidence_of(base: Path, adapter: Path, root: Path, level: Any = "full", **options: Any) -> Evidence:
    """Return the evidence of an output without its small files: what the recomputation looks at."""
    plan = lora_merge.plan(base=base, adapter=adapter, **options)
    return Evidence(plan, root, tuple(fill(plan, root)), level)
