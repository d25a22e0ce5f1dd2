"""The second barrier around untrusted configurations: a thread that builds a model of one is cut off from every hub.

The first is `modeling.plain_config`, which leaves nothing to fetch. This one holds for what a next release of transformers, PEFT
or timm may come to fetch: no request leaves, no token is read, no kernel is loaded as code.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_STATE = threading.local()

_SWITCHES = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN")
"""Settings of huggingface_hub: no request at all; no token but the one that a call names."""

_KERNEL_LOADERS = {
    "transformers.integrations.hub_kernels": ("get_kernel", "get_kernel_hub"),
    "kernels": ("get_kernel", "get_locked_kernel", "get_local_kernel", "load_kernel"),
}
"""Functions that download and import a repo of code (transformers 5.23, kernels 0.18)."""


class _Switch:
    """A setting that is on in threads that are cut off, and elsewhere what it was.

    Settings belong to the process: a plain True would stop downloads in the caller's other threads.
    """

    def __init__(self, elsewhere: object) -> None:
        self._elsewhere = elsewhere

    def __bool__(self) -> bool:
        return is_cut_off() or bool(self._elsewhere)

    def __repr__(self) -> str:
        return repr(bool(self))


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """Let this thread ask no hub and load no kernel while the block runs. It may be nested, and used as a decorator.

    Code that still asks gets huggingface_hub's ``OfflineModeIsEnabled``, or a ``FileNotFoundError`` for a kernel.
    """
    _guard()
    _STATE.depth = getattr(_STATE, "depth", 0) + 1
    try:
        yield
    finally:
        _STATE.depth -= 1


def is_cut_off() -> bool:
    """Return True in a thread that is inside `cut_off`."""
    return getattr(_STATE, "depth", 0) > 0


def _guard() -> None:
    """Put the switches and guards in place where they are not yet."""
    # They stay in place: in a thread that is not cut off they change nothing.
    from huggingface_hub import constants

    for name in _SWITCHES:
        if not isinstance(getattr(constants, name), _Switch):
            setattr(constants, name, _Switch(getattr(constants, name)))
    if "transformers" in sys.modules:
        importlib.import_module(
            "transformers.integrations.hub_kernels"
        )  # which imports kernels, if it is installed
    for module, names in _KERNEL_LOADERS.items():
        for name in names:
            load = getattr(sys.modules.get(module), name, None)
            if callable(load) and not hasattr(load, "lora_merge_guard"):
                setattr(sys.modules[module], name, _guarded(load))


def _guarded(load: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loader of kernels that raises FileNotFoundError in threads that are cut off."""

    @functools.wraps(load)
    def guarded(*arguments: Any, **options: Any) -> Any:
        if is_cut_off():  # the one error that all of transformers' callers take for "there is no such kernel"
            raise FileNotFoundError("no kernel is loaded for a model that is only inspected")
        return load(*arguments, **options)

    guarded.lora_merge_guard = True  # type: ignore[attr-defined]
    return guarded
