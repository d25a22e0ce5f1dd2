"""Sends staged files to the disk in a thread, beside the work."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Self

from lora_merge.errors import WriteError

if TYPE_CHECKING:
    from lora_merge.storage.folder import Folder

_PAUSE_SECONDS = 0.1
"""Pause between two flushes of files that are still being written."""


class Flushing:
    """Flushes staged files in the background, again and again, and makes them durable at the end.

    A context. After an error in its block the disk is not waited for, since what is staged will be cleared.
    """

    def __init__(self, staged: Folder) -> None:
        self._staged = staged
        self._failure: WriteError | None = None
        self._finished: deque[str] = deque()
        self._resting, self._complete, self._over = (threading.Event() for _ in range(3))
        # A daemon: after an error nothing waits for the disk, since what is staged will be cleared.
        self._thread = threading.Thread(target=self._flush, name="flush", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # In this order: the thread looks at the first as soon as the second is set.
        self._over.set()
        self._complete.set()

    def _flush(self) -> None:
        """Run in the thread: flush repeatedly, and once more after the last write."""
        try:
            # Steady flushing leaves little for the end: the last flush would otherwise wait for the whole
            # output.
            while not self._complete.wait(_PAUSE_SECONDS):
                if not self._resting.is_set():
                    self._staged.flush()
                while self._resting.is_set() and self._finished and not self._complete.is_set():
                    self._staged.flush_file(self._finished.popleft())
            if not self._over.is_set():
                self._staged.flush()
        except WriteError as exc:
            self._failure = exc

    def add(self, name: str) -> None:
        """Flush a file that nothing is written to any more."""
        self._finished.append(name)

    def rest(self) -> None:
        """From now on flush finished files only, until `wait`. Flushing a file blocks those who write to it past the
        page cache.
        """
        self._resting.set()

    def wait(self) -> None:
        """Wait until everything is durable. Nothing may be written afterwards.

        Raises:
            WriteError: the disk refused something.
        """
        self._complete.set()
        self._thread.join()
        if self._failure:
            raise self._failure
