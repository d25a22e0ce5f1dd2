"""What the facts about a machine mean for a merge, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lora_merge.diagnosis.facts import Finding
from lora_merge.words import listing, size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.diagnosis.facts import Disk, Machine

_LITTLE_DISK: Final = 20_000_000_000
"""Bytes. An 8B model in bfloat16 takes 16 GB."""

_LITTLE_MEMORY: Final = 2_000_000_000
"""Bytes. torch takes about 0.3 GB, and a merge of an 8B model less than 2 GB."""

_ON: Final = {"1", "on", "yes", "true"}


def findings(machine: Machine) -> tuple[Finding, ...]:
    """Return what was found: errors first, then warnings, then what is in order."""
    found = [
        *_about_torch(machine),
        *_about_packages(machine),
        *_about_disks(machine),
        *_about_memory(machine),
        *_about_hub(machine),
    ]
    if not any(one.severity == "error" for one in found):
        found.append(Finding("ok", "a plain LoRA can be merged on this machine"))
    order = ("error", "warning", "ok")
    return tuple(sorted(found, key=lambda one: order.index(one.severity)))


def _about_torch(machine: Machine) -> Iterator[Finding]:
    torch = machine.torch
    if torch.problem:
        yield Finding(
            "error",
            f"torch cannot be imported ({torch.problem})",
            "reinstall it: pip install --force-reinstall torch",
        )
    elif torch.gpus:
        yield Finding("ok", f"torch can use {listing([gpu.name for gpu in torch.gpus])}: --device cuda")
    elif torch.build != "CPU":
        yield Finding(
            "warning",
            f"torch is built for {torch.build}, but finds no GPU; merges run on the CPU",
            "check nvidia-smi (or rocm-smi) and CUDA_VISIBLE_DEVICES, if you expect a GPU",
        )
    else:
        yield Finding("ok", "torch runs on the CPU, which is the default device of a merge")


def _about_packages(machine: Machine) -> Iterator[Finding]:
    for package in machine.packages:
        if package.extra == "beside" or (package.name == "torch" and machine.torch.problem):
            continue
        extra = f'pip install "lora-merge[{package.extra}]"'
        command = extra if package.extra else f'pip install "{package.name}>={package.oldest}"'
        if package.is_missing and not package.extra:
            yield Finding("error", f"{package.name} is not installed; {package.purpose} needs it", command)
        elif package.is_missing:
            yield Finding(
                "warning", f"{package.name} is not installed; needed for {package.purpose}", command
            )
        elif package.is_too_old:
            sentence = f"{package.name} {package.version} is too old, expected {package.oldest} or newer"
            yield Finding("warning" if package.extra else "error", sentence, command)


def _about_disks(machine: Machine) -> Iterator[Finding]:
    for disk in machine.disks:
        if not disk.is_writable:
            yield Finding("warning", f"the {disk.name} ({disk.path}) is not writable", _where_instead(disk))
        elif disk.free_bytes < _LITTLE_DISK and disk.name != "temporary files":
            sentence = f"the {disk.name} has {size_text(disk.free_bytes)} free; a model of 8B parameters in bfloat16 takes 16 GB"
            yield Finding("warning", sentence, _where_instead(disk))
        if disk.has_reflinks:
            yield Finding("ok", "the filesystem supports reflinks: unchanged weight files take no space")


def _where_instead(disk: Disk) -> str:
    return {
        "current directory": "write the output to another disk: -o /path/on/another/disk",
        "Hub cache": "set HF_HUB_CACHE to a directory on another disk",
        "temporary files": "set TMPDIR to another directory",
    }[disk.name]


def _about_memory(machine: Machine) -> Iterator[Finding]:
    free = machine.memory_free_bytes
    if free is not None and free < _LITTLE_MEMORY:
        yield Finding(
            "warning",
            f"{size_text(free)} of memory are free; a merge takes between 0.5 and 2 GB",
            "close other programs, or set --memory-limit 1GB",
        )


def _about_hub(machine: Machine) -> Iterator[Finding]:
    values = {variable.name: variable.value for variable in machine.variables}
    if values.get("HF_HUB_OFFLINE", "").lower() in _ON:
        yield Finding(
            "warning",
            "HF_HUB_OFFLINE is set: repos are taken from the cache only",
            "unset HF_HUB_OFFLINE to download repos",
        )
