"""What a task asks a cluster for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_merge.words import counted, listing, size_text


def _ignore(sentence: str) -> None:
    del sentence


@dataclass(frozen=True, slots=True)
class Demand:
    """What each task needs, and how often it may be lost."""

    memory_bytes: int
    """Resident memory of one task. Ray counts it off the memory of a node; it does not enforce it."""

    retries: int = 3
    """How often a task is begun again after its process or its node was lost."""

    device: str = "cpu"
    """A torch device; a task of any other than the CPU gets a GPU of its node for itself."""

    is_limited: bool = False
    """True where ``--workers`` limits the tasks. Otherwise nodes that come later get tasks too."""

    tell: Callable[[str], None] = _ignore
    """Hears why no task runs; an empty text when one does again."""

    @property
    def n_gpus(self) -> int:
        """GPUs of a task."""
        return int(self.device != "cpu")

    @property
    def resources(self) -> dict[str, float]:
        """Return Ray's name of each resource → how much of it a task needs."""
        needed = {"CPU": 1.0, "memory": float(self.memory_bytes), "GPU": float(self.n_gpus)}
        return {name: amount for name, amount in needed.items() if amount}

    def fits(self, resources: dict[str, float]) -> bool:
        """Return True where a node with these resources has room for a task."""
        return all(resources.get(name, 0) >= amount for name, amount in self.resources.items())


def resources_text(resources: dict[str, float]) -> str:
    """Return resources in words.

    Example:
        >>> resources_text({"CPU": 8.0, "memory": 3e9, "node:10.0.0.1": 1.0})
        '8 CPUs and 3.00 GB of memory'
    """
    found = [counted(round(resources.get("CPU", 0)), "CPU")]
    if resources.get("GPU"):
        found.append(counted(round(resources["GPU"]), "GPU"))
    found.append(f"{size_text(int(resources.get('memory', 0)))} of memory")
    return " and ".join(filter(None, [listing(found[:-1]), found[-1]]))
