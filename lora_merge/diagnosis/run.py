"""Looks at this machine, and says whether it can merge."""

from __future__ import annotations

import os
import platform
import sys
from typing import TYPE_CHECKING

from lora_merge._version import __version__
from lora_merge.diagnosis.devices import torch_facts
from lora_merge.diagnosis.facts import Diagnosis, Machine
from lora_merge.diagnosis.findings import findings
from lora_merge.diagnosis.packages import engine_packages, packages
from lora_merge.diagnosis.places import caches, disks, programs
from lora_merge.diagnosis.stores import stores
from lora_merge.diagnosis.variables import variables
from lora_merge.native.library import library
from lora_merge.runtime.machine import free_bytes, usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping


def diagnose(environ: Mapping[str, str] = os.environ) -> Diagnosis:
    """Return a diagnosis of this machine. It imports torch, and uses no network.

    What cannot be found out is left out; nothing is raised for it.
    """
    machine = Machine(
        version=__version__,
        python=platform.python_version(),
        executable=sys.executable,
        platform=platform.platform(),
        n_cores=usable_cores(),
        memory_free_bytes=free_bytes(),
        memory_total_bytes=_total_bytes(),
        torch=torch_facts(),
        packages=packages(),
        disks=disks(environ),
        caches=caches(environ),
        engines=(*engine_packages(), *programs()),
        variables=variables(environ),
        stores=stores(environ),
        loops=found.vectors if (found := library()) else "",
    )
    return Diagnosis(machine, findings(machine))


def _total_bytes() -> int | None:
    """Return the machine's memory in bytes; None where the platform does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
