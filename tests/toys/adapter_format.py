"""An adapter format: a configuration with one scale for all modules, and ``crate.safetensors`` with ``MODULE/up``, ``MODULE/down``."""

from __future__ import annotations

from lora_merge.adapters import Format
from lora_merge.adapters.directory import assemble
from lora_merge.adapters.non_finite import non_finite
from lora_merge.core.adapter import Delta
from lora_merge.core.checkpoint import ADAPTER_CONFIG
from lora_merge.deltas import LowRankFacts
from lora_merge.formats.safetensors import read_header
from lora_merge.storage.small_files import read_json
from tests import twins

WEIGHTS = "crate.safetensors"
ROLES = {"down": "A", "up": "B"}


def read_crate(root, ignored=()):
    if not ((root / ADAPTER_CONFIG).is_file() and (root / WEIGHTS).is_file()):
        return None
    config, refs = read_json(root / ADAPTER_CONFIG), read_header(root / WEIGHTS).tensors
    modules = {}
    for ref in refs:
        module, _, role = ref.name.rpartition("/")
        modules.setdefault(module, {})[ROLES[role]] = ref
    deltas = tuple(
        Delta(f"{module}.weight", LowRankFacts(), factors, config["scale"])
        for module, factors in modules.items()
    )
    content = {"deltas": deltas, "modules": frozenset(modules)}
    fields = {
        "peft_type": "LORA",
        "target_modules": sorted(modules),
        "base_model_name_or_path": config["base"],
    }
    return assemble((root / WEIGHTS,), "crate", fields, content, non_finite(refs), ignored)


def pack(adapter, root):
    """Write a LoRA of PEFT as a crate."""
    config, tensors = twins.load(adapter)
    spelled = {}
    for name, tensor in tensors.items():
        module, _, role = name.removeprefix(twins.PREFIX).removesuffix(".weight").rpartition(".lora_")
        spelled[f"{module}/{'down' if role == 'A' else 'up'}"] = tensor
    fields = {"base": config["base_model_name_or_path"], "scale": config["lora_alpha"] / config["r"]}
    return twins.save(root, fields, spelled, WEIGHTS)


CRATE = Format(read_crate, WEIGHTS, f"{ADAPTER_CONFIG} with {WEIGHTS} (a crate)")
