"""What a diagnosis knows of a machine, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_merge.runtime.packages import release_numbers

Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Package:
    """A package of Python that lora-merge can use."""

    name: str
    version: str
    """Empty if it is not installed."""

    oldest: str
    """The oldest version that works; empty if any does."""

    extra: str
    """The extra of lora-merge that brings it; empty for one that every merge needs."""

    purpose: str
    """What needs it."""

    @property
    def is_missing(self) -> bool:
        """True if it is not installed."""
        return not self.version

    @property
    def is_too_old(self) -> bool:
        """True if a newer version is needed."""
        has_both = bool(self.version and self.oldest)
        return has_both and release_numbers(self.version) < release_numbers(self.oldest)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device that torch can use."""

    name: str
    memory_bytes: int
    capability: str
    """Compute capability, as in ``9.0``."""


@dataclass(frozen=True, slots=True)
class Torch:
    """The installed torch."""

    version: str
    build: str
    """What it was built for: ``CPU``, ``CUDA 12.8``, ``ROCm 6.3``."""

    gpus: tuple[Gpu, ...]
    problem: str = ""
    """Why it cannot be imported; empty if it can."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A directory where files are written."""

    name: str
    path: str
    filesystem: str
    free_bytes: int
    total_bytes: int
    is_writable: bool
    has_reflinks: bool | None = None
    """None if it was not tried."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A directory of downloaded repos."""

    name: str
    path: str
    n_repos: int


@dataclass(frozen=True, slots=True)
class Engine:
    """A program or package that runs merged checkpoints."""

    name: str
    version: str
    """Of the package in this environment; empty if only the program was found."""

    place: str
    """Path of the program; empty for a package alone."""


@dataclass(frozen=True, slots=True)
class StoreAccess:
    """A kind of object store."""

    name: str
    """What its URLs begin with: ``s3://``."""

    credentials: str
    """Where they were found, never what they are; empty if nowhere."""


@dataclass(frozen=True, slots=True)
class Variable:
    """An environment variable that changes what lora-merge does."""

    name: str
    value: str
    """``(set)`` for a secret."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that was found."""

    version: str
    python: str
    executable: str
    platform: str
    n_cores: int
    memory_free_bytes: int | None
    memory_total_bytes: int | None
    torch: Torch
    packages: tuple[Package, ...]
    disks: tuple[Disk, ...]
    caches: tuple[Cache, ...]
    engines: tuple[Engine, ...]
    variables: tuple[Variable, ...]
    loops: str = ""
    """Vectors that the compiled loops use here; empty without them."""

    stores: tuple[StoreAccess, ...] = ()
    """Empty if the package that speaks to them is not installed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know, and what to do about it."""

    severity: Severity
    sentence: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A machine, and what was found out about it."""

    machine: Machine
    findings: tuple[Finding, ...]

    @property
    def can_merge(self) -> bool:
        """False if something makes every merge impossible."""
        return all(finding.severity != "error" for finding in self.findings)
