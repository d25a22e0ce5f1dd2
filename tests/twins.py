"""One PEFT adapter in the spellings of other trainers: the same factors, to be merged to the same bytes."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PREFIX = "base_model.model."
WEIGHTS = {"mlx": "adapters.safetensors"}
"""The file of tensors of each format, where it is not PEFT's."""


def load(adapter: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration and the tensors of a PEFT adapter."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    return config, load_file(adapter / "adapter_model.safetensors")


def save(root: Path, config: dict[str, Any], tensors: dict[str, Any], weights: str) -> Path:
    """Write an adapter directory."""
    from safetensors.torch import save_file

    root.mkdir(parents=True, exist_ok=True)
    (root / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / weights)
    return root


def respelled(adapter: Path, root: Path, spell: Callable[[str], str], **fields: Any) -> Path:
    """Return a PEFT adapter whose tensors have other names."""
    config, tensors = load(adapter)
    renamed = {spell(name): tensor for name, tensor in tensors.items()}
    return save(root, config | fields, renamed, "adapter_model.safetensors")


def named(name: str, adapter: str) -> str:
    """Return the name that a tensor has in the model's own state_dict, where the adapter is called so."""
    if name.endswith("lora_magnitude_vector"):
        return f"{name}.{adapter}.weight"
    if name.endswith((".weight", ".bias")) and "lora_" in name:
        stem, _, last = name.rpartition(".")
        return f"{stem}.{adapter}.{last}"
    if "lora_" in name or "hada_" in name:
        return f"{name}.{adapter}"
    stem, _, last = name.rpartition(".")
    return f"{stem}.modules_to_save.{adapter}.{last}"


def swift(adapter: Path, root: Path, name: str = "default") -> Path:
    """Return the subfolder of a ``SwiftModel``: no prefix, the adapter's name, fields of its own."""
    config, tensors = load(adapter)
    fields = {
        "swift_type": "LORA", "model_key_mapping": None, "use_qa_lora": False, "use_merged_linear": False,
        "enable_lora": None, "lora_dtype": None, "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6,
    }  # fmt: skip
    (root / "configuration.json").parent.mkdir(parents=True, exist_ok=True)
    (root / "configuration.json").write_text("{}")
    spelled = {named(key, name).removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    return save(root / name, config | fields, spelled, "adapter_model.safetensors")


def mlx(adapter: Path, root: Path, **settings: Any) -> Path:
    """Return what mlx-lm would have saved: factors the other way round, and a scale that is all of it."""
    config, tensors = load(adapter)
    spelled = {}
    for name, tensor in tensors.items():
        module, lora, role = name.removeprefix(PREFIX).partition(".lora_")
        if not lora:
            continue  # the embedding itself, which PEFT saves along
        leaf = {
            "A.weight": "lora_a", "B.weight": "lora_b", "embedding_A": "lora_a", "embedding_B": "lora_b",
            "magnitude_vector": "m",
        }[role]  # fmt: skip
        spelled[f"{module}.{leaf}"] = tensor.T
    keys = sorted(
        {name.partition(".layers.")[2].partition(".")[2].rpartition(".")[0] for name in spelled} - {""}
    )
    keys += sorted({name.rpartition(".")[0] for name in spelled if ".layers." not in name})
    parameters = {
        "rank": config["r"],
        "scale": config["lora_alpha"] / config["r"],
        "dropout": 0.0,
        "keys": keys,
    }
    return save(
        root,
        {
            "fine_tune_type": "dora" if config["use_dora"] else "lora", "num_layers": 2, "seed": 0,
            "lora_parameters": parameters, "model": config["base_model_name_or_path"], **settings,
        },
        spelled,
        WEIGHTS["mlx"],
    )  # fmt: skip


def replace_by(adapter: Path, kind: str) -> None:
    """Turn a directory with a PEFT adapter into one of another format."""
    aside = adapter.with_name(f"{adapter.name}-{kind}")
    made = mlx(adapter, aside) if kind == "mlx" else swift(adapter, aside)
    shutil.rmtree(adapter)
    shutil.move(made, adapter)
    shutil.rmtree(aside, ignore_errors=True)
