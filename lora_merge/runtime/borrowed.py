"""A setting of the whole process that several threads change for a while; the last one to leave restores it."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Value = TypeVar("Value")


class Borrowed(Generic[Value]):
    """A setting that several threads change at the same time, all to the same value.

    A thread that saved it and put it back by itself would save what another thread had set, or put the old value back
    while the other still needs the new one. So the first thread to come saves it, and the last to leave puts it back.

    Args:
        read: returns the setting.
        write: changes it.
        value: what it is while anybody needs it.
    """

    def __init__(self, read: Callable[[], Value], write: Callable[[Value], object], value: Value) -> None:
        self._read, self._write, self._value = read, write, value
        self._lock = threading.Lock()
        self._before: list[Value] = []
        """The saved setting; empty while no thread has it changed."""

        self._n_users = 0

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        """Have the setting changed, at least while the block runs."""
        with self._lock:
            if not self._n_users:
                self._before = [self._read()]
            self._n_users += 1
            self._write(self._value)
        try:
            yield
        finally:
            with self._lock:
                self._n_users -= 1
                if not self._n_users:
                    self._write(self._before.pop())
