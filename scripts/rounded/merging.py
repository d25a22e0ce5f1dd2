"""What the measurements ask of lora-merge: to quantise a checkpoint, to decode one, and to merge with each rounding."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Final

import lora_merge

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from lora_merge.requests.choices import VerifyLevel

ROUNDINGS: Final = ("nearest", "stochastic", "adapter")

TINY: Final = 1e-30
"""Size of a change that is lost in float32 already: W + 1e-30 is W, but where W is 0. A merge of such an adapter quantises
or decodes a checkpoint and does nothing else.
"""

VERIFY: Final[VerifyLevel] = "sample"
"""Merges are verified as they always are."""

Tensors = dict[str, "torch.Tensor"]


def write_adapter(folder: Path, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """Write a LoRA as PEFT stores it, and return its folder.

    Args:
        folder: is replaced.
        factors: module, such as ``model.layers.0.mlp.down_proj`` → A and B.

    Shapes:
        factors: float32 ``[r, in]`` and ``[out, r]``; r is the same for all. α = r, so the change is BA.
    """
    from safetensors.torch import save_file

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors, rank = {}, 0
    for module, (a, b) in factors.items():
        rank = len(a)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(factors),
        "base_model_name_or_path": "base",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder


def quantised(base: Path, out: Path, scheme: str, tiny: Path) -> Path:
    """Quantise a checkpoint as it is (``--quantize``), and return the folder.

    Args:
        base: in BF16.
        out: is replaced.
        scheme: of lora-merge.
        tiny: an adapter whose change is about `TINY`.
    """
    _clear(out)
    lora_merge.merge(base=base, adapter=tiny, out=out, quantize=scheme, verify=VERIFY)
    return out


def decoded(base: Path, out: Path, tiny: Path) -> Path:
    """Store the values of a quantised checkpoint as a plain one in float32, exactly, and return the folder. A plain one is
    returned as it is.

    Args:
        base: quantised or not.
        out: is replaced.
        tiny: an adapter whose change is about `TINY`.
    """
    if not is_quantised(base):
        return base
    _clear(out)
    lora_merge.merge(
        base=base,
        adapter=tiny,
        out=out,
        out_storage="dense",
        dtype="float32",
        allow_again=True,
        verify="none",
    )
    return out


def merged(
    base: Path, adapter: Path, out: Path, rounding: str, weight: float = 1.0, scheme: str | None = None
) -> Path:
    """Merge an adapter into a checkpoint, and return the folder.

    Args:
        base: quantised or plain. The output is stored as it is.
        adapter: what is merged.
        out: is replaced.
        rounding: one of `ROUNDINGS`; ``"exact"`` stores a plain base in float32 instead.
        weight: of the adapter.
        scheme: quantises the output (``--quantize``).
    """
    _clear(out)
    inputs = {"base": base, "adapter": {str(adapter): weight}, "out": out, "verify": VERIFY}
    if rounding == "exact":
        lora_merge.merge(**inputs, dtype="float32")  # type: ignore[arg-type]
        return out
    storage = {"quantize": scheme} if scheme else {"out_storage": "base"} if is_quantised(base) else {}
    lora_merge.merge(**inputs, **storage, rounding=rounding, allow_loss=True)  # type: ignore[arg-type]
    return out


def is_quantised(folder: Path) -> bool:
    """Return whether a checkpoint is stored quantised."""
    return "quantization_config" in json.loads((folder / "config.json").read_text())


def tensors_of(folder: Path) -> Tensors:
    """Return all tensors of a plain checkpoint, in float32."""
    from safetensors.torch import load_file

    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: tensor.float() for name, tensor in load_file(file).items()}
    return found


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
