"""Torch, set up for a merge: loaded in the background, one thread per worker, on the device that is asked for."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_COPYING = ("concurrent.futures.thread", "xxhash")
"""What is imported on the way, when tensors are copied."""

_SWITCH_SECONDS = 2e-4
"""How long the thread that imports torch may keep the interpreter from those that copy; Python's own is 25 times
that, and a copy of a model asks for the interpreter a thousand times."""


class NoDeviceError(Exception):
    """There is no such device on this machine."""


def pick_device(wanted: str) -> tuple[str, str]:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``, and why it is not the one asked for.

    ``auto`` is the CPU: a merge is bound by reading and writing, and the CPU's bits are PEFT's. Where torch sees no
    CUDA device at all, a merge for one is done on the CPU, with the same values up to rounding.

    Raises:
        NoDeviceError: there are CUDA devices, and this is not one of them.
    """
    if wanted in {"auto", "cpu"}:
        return "cpu", ""
    import torch

    n_devices = torch.cuda.device_count()
    if not n_devices:
        return "cpu", f"torch {torch.__version__} sees no CUDA device, so the merge is done on the CPU"
    index = int(wanted.partition(":")[2] or 0)
    if index >= n_devices:
        raise NoDeviceError(f"there is no {wanted}: torch {torch.__version__} sees {n_devices} CUDA devices")
    return f"cuda:{index}", ""


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Give torch one thread per worker while it lasts: its own pool would fight the workers."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchLoading:
    """Imports torch in the background, for what can be done meanwhile without it.

    After an error nobody waits for it: an interrupt may have struck inside another import, and left a lock
    held that this one needs. What copying imports is imported before, because Python swallows an interrupt that
    strikes while it tidies up after an import, and keeps the lock.
    """

    def __init__(self) -> None:
        for name in _COPYING:
            importlib.import_module(name)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._load, name="torch", daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            importlib.import_module("torch")
        except BaseException as exc:  # noqa: BLE001 - for whoever waits; after an interrupt nobody does
            self._failure = exc

    def wait(self) -> None:
        """Wait until it is there, or raise what kept it from being there."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure


@contextlib.contextmanager
def quick_turns() -> Iterator[None]:
    """Let threads take turns more often than Python does by itself, while one of them imports."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
