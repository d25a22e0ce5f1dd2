"""Torch, set up for a merge: loaded in the background, one thread per worker, on the device that was asked for."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from typing import TYPE_CHECKING

from lora_merge.runtime import libtorch
from lora_merge.runtime.borrowed import Borrowed
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterable

_USED_MEANWHILE = ("concurrent.futures.thread", "email.parser", "importlib.metadata", "xxhash")
"""Modules that are used while torch is imported: by threads that copy, and for torch's version in the fingerprint of a
merge, which is read with the parser of mails.
"""

_SWITCH_SECONDS = 2e-4
"""How long the thread that imports torch may keep the interpreter from those that copy; Python's own is 25 times
that, and a copy of a model asks for the interpreter a thousand times."""


class NoDeviceError(Exception):
    """The machine has CUDA devices, but not the one that was asked for."""


def pick_device(wanted: str) -> tuple[str, str]:
    """Return the torch device for ``cpu``, ``cuda`` or ``cuda:N``; and a reason where it is not the device asked for.

    ``auto`` is the CPU until there is a plan (`merging.device_choice`). Where torch sees no CUDA device at all, a merge for
    one is done on the CPU, with the same values up to rounding.

    Raises:
        NoDeviceError: there are CUDA devices, but not this one.
    """
    if wanted in {"auto", "cpu"}:
        return "cpu", ""
    import torch

    n_devices = torch.cuda.device_count()
    if not n_devices:
        return "cpu", f"torch {torch.__version__} finds no CUDA device, so the merge runs on the CPU"
    index = int(wanted.partition(":")[2] or 0)
    if index >= n_devices:
        raise NoDeviceError(
            f"there is no {wanted}: torch {torch.__version__} finds {counted(n_devices, 'CUDA device')}"
        )
    return f"cuda:{index}", ""


class TorchLoading:
    """Imports torch in the background (a second or more), while copying runs without it.

    After an error the import is not waited for: an interrupt may have hit another import and left a lock held that
    this one needs.

    Args:
        also: modules that this run uses meanwhile, beside those of every run.
    """

    def __init__(self, also: Iterable[str] = ()) -> None:
        # Beside torch's import each takes long, and is easily hit by an interrupt. Python swallows one that arrives while
        # it cleans up after an import, and keeps the lock (`interrupts.strike`, which a program that calls us need not have).
        for name in (*_USED_MEANWHILE, *also):
            importlib.import_module(name)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._load, name="torch", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            # Else the import would wait for it, and keep the interpreter meanwhile.
            libtorch.wait()
            importlib.import_module("torch")
        except BaseException as exc:  # noqa: BLE001 - for whoever waits; after an interrupt nobody does
            self._failure = exc

    @property
    def is_over(self) -> bool:
        """True once torch is imported, or could not be."""
        return not self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """True once torch is imported."""
        return self.is_over and self._failure is None

    def wait(self) -> None:
        """Wait until torch is imported.

        Raises:
            BaseException: what the import raised.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure


_SWITCH_INTERVAL = Borrowed(sys.getswitchinterval, sys.setswitchinterval, _SWITCH_SECONDS)


def short_switch_interval() -> contextlib.AbstractContextManager[None]:
    """Let threads take turns every 0.2 ms (`_SWITCH_SECONDS`) instead of Python's 5 ms, while one of them imports."""
    return _SWITCH_INTERVAL.changed()
