"""Downloads that stop when the user interrupts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_PATIENCE_SECONDS = 5.0  # for downloads to stop after an interrupt; they look after every block


class StoppedError(Exception):
    """Raised inside a download to end it, from its progress callback."""


def interruptible(work: Callable[[], T], stop: threading.Event) -> T:
    """Run a download in a thread and return its result. An interrupt stops the download instead of waiting for it.

    Args:
        work: the download.
        stop: set on an interrupt; ``work`` looks at it after every block.

    Raises:
        KeyboardInterrupt: as it came.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as exc:  # noqa: BLE001 - raised again where it is waited for
            outcome.set_exception(exc)

    # A daemon: a download that does not stop must not keep the program from ending.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        stop.set()
        thread.join(_PATIENCE_SECONDS)
        raise


def is_named(exc: BaseException, *words: str) -> bool:
    """Return True when the class of an error, or of one of its causes, has one of the words in its name."""
    chain: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return any(word in kind.__name__ for error in chain for kind in type(error).__mro__ for word in words)
