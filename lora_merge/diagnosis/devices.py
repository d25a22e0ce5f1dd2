"""The installed torch and the devices that it can use."""

from __future__ import annotations

from typing import Any

from lora_merge.diagnosis.facts import Gpu, Torch

_SHOWN = 300
"""Most characters of torch's own words about an import that failed."""


def torch_facts() -> Torch:
    """Import torch, and return what it can use. A torch that is missing or broken is a fact, too."""
    try:
        import torch
    except Exception as exc:  # noqa: BLE001 - a broken build may raise anything
        text = " ".join(str(exc).split())[:_SHOWN]
        return Torch("", "", (), f"{type(exc).__name__}: {text}")
    return Torch(str(torch.__version__), _build(torch), _gpus(torch))


def _build(torch: Any) -> str:
    if getattr(torch.version, "hip", None):
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _gpus(torch: Any) -> tuple[Gpu, ...]:
    """Return the GPUs that can be used; none where the driver fails."""
    try:
        found = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    except Exception:  # noqa: BLE001 - a driver that does not fit raises many kinds of errors
        return ()
    return tuple(Gpu(one.name, one.total_memory, f"{one.major}.{one.minor}") for one in found)
