"""Torch's number of threads, lowered to one while something else is parallel, or is too small to be."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Result = TypeVar("Result")


class _TorchThreads:
    """Torch's number of threads, for merges that several threads of a program may run at the same time.

    Torch keeps this number twice: for the process, from which a thread takes its own when it first asks, and in each
    thread. Setting it sets both, so the number of the process is read and set in a thread that is made for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._of_process = 0
        self._local = threading.local()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Give torch one thread in this thread. Afterwards this thread has its number again; the last user restores
        the process's.
        """
        # Nested use: the outermost one restores.
        if getattr(self._local, "is_user", False):
            yield
            return
        self._local.is_user = True
        own = self._enter()
        try:
            yield
        finally:
            self._leave(own)
            self._local.is_user = False

    def _enter(self) -> int:
        import torch

        with self._lock:
            own = torch.get_num_threads()
            if not self._n_users:
                self._of_process = _in_new_thread(torch.get_num_threads)
            elif own == 1:  # a thread that never asked before has just taken what the others have set
                own = self._of_process
            self._n_users += 1
            torch.set_num_threads(1)
        return own

    def _leave(self, own: int) -> None:
        import torch

        with self._lock:
            self._n_users -= 1
            torch.set_num_threads(own)
            of_process = 1 if self._n_users else self._of_process
            _in_new_thread(lambda: torch.set_num_threads(of_process))


_TORCH_THREADS = _TorchThreads()


def one_torch_thread(*, has_torch: bool = True) -> contextlib.AbstractContextManager[None]:
    """Give torch one thread per worker while the context lasts. Workers are the parallelism; torch's own pool would
    compete with them for the cores.

    Args:
        has_torch: False where torch is not needed: then it is not loaded for this, and nothing is done.
    """
    return _TORCH_THREADS.one() if has_torch else contextlib.nullcontext()


def _in_new_thread(call: Callable[[], Result]) -> Result:
    """Run a call in a new thread and return its result: a new thread takes torch's number for the process."""
    found: list[Result] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]
