"""What runs on a node of a Ray cluster: it makes a worker once for each process, and does one piece with it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pickle
import traceback
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_merge._version import __version__
from lora_merge.errors import CheckpointError, LoraMergeError, WriteError
from lora_merge.executors.cuda import cuda_thread
from lora_merge.executors.processes import Broken, Raised
from lora_merge.native.library import library
from lora_merge.runtime.shortage import translate_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True, slots=True)
class Begun:
    """The first message of a task: it has a place, and works."""

    node: str
    """Address of the node."""

    process: int


@cache
def versions() -> str:
    """Return what has to be equal where outputs are to have equal bytes, in words."""
    loops = "with" if library() else "without"
    return f"lora-merge {__version__} {loops} compiled loops, torch {importlib.metadata.version('torch')}"


def carry_out(run: str, expected: str, spec: list[Any], piece: bytes, device: str) -> Iterator[object]:
    """Yield `Begun`, then the result of a piece: a `Raised` or a `Broken` for an error.

    Always two messages: a task that Ray begins again sends the same number, and the driver has perhaps got the first one already.

    Args:
        run: names the spec, so that a process which has made its worker keeps it.
        expected: the `versions` of the driver.
        spec: a list with one reference to the pickled spec; it is fetched only where it is needed.
        piece: pickled.
        device: a torch device.
    """
    import ray

    node = ray.util.get_node_ip_address()
    yield Begun(node, os.getpid())
    yield _answer(lambda: _done(run, expected, spec, piece, device, node))


def _answer(do: Callable[[], object]) -> object:
    """Return the result, or the error as a value: Ray would wrap it."""
    try:
        with translate_out_of_memory("merging"):
            return do()
    except LoraMergeError as exc:
        return Raised(exc)
    except Exception as exc:  # noqa: BLE001 - whatever it is, the driver is to say it
        return Broken(type(exc).__name__, str(exc), traceback.format_exc())


def _done(run: str, expected: str, spec: list[Any], piece: bytes, device: str, node: str) -> object:
    """Return the result of a piece.

    Raises:
        LoraMergeError: the worker raised it, or this node cannot do it.
    """
    # Before anything is unpickled: another release may not know it.
    if versions() != expected:
        sentence = f"node {node} of the Ray cluster has {versions()}, and the driver has {expected}"
        raise WriteError(
            sentence, hint="install the same versions on every node; outputs could differ otherwise"
        )
    try:
        return _KEPT.worker(run, spec, device)(pickle.loads(piece))  # noqa: S301 - from our own driver
    except CheckpointError as exc:
        if "://" in exc.file or os.path.exists(exc.file):  # noqa: PTH110 - a text that may be anything
            raise
        raise CheckpointError(
            exc.file,
            "",
            f"is not on node {node} of the Ray cluster",
            hint="put inputs on a filesystem that every node has at the same path, or into a store; --stream-base reads a base of the Hub by ranges",
        ) from exc


class _Kept:
    """The worker of this process, for as long as tasks of one run come."""

    def __init__(self) -> None:
        self._run = ""
        self._stack = contextlib.ExitStack()
        self._worker: Callable[[Any], object] | None = None

    def worker(self, run: str, spec: list[Any], device: str) -> Callable[[Any], object]:
        """Return the worker of a run; that of another run ends."""
        if self._worker is None or self._run != run:
            import ray

            self._worker = None
            self._stack.close()
            (reference,) = spec
            made = pickle.loads(ray.get(reference))  # noqa: S301 - from our own driver
            if device != "cpu":
                self._stack.enter_context(cuda_thread(device))
            (self._worker,) = self._stack.enter_context(made.make(1))
            self._run = run
        return self._worker


_KEPT = _Kept()
