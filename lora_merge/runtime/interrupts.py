"""Interrupts that arrive while Python holds one of its own locks."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_IMPORT_CODE = "<frozen importlib._bootstrap>"
"""The file of Python's own import code: it takes and frees the locks of imports."""

_LATER_SECONDS = 1e-3
"""When an interrupt that comes in the middle of that code is tried again. It is through in microseconds."""


def strike(signum: int, frame: FrameType | None) -> None:
    """Handle a signal: raise KeyboardInterrupt, but not before Python's own import code is through.

    Inside it the interrupt would leave a lock held for which every other thread that imports waits for ever, and it may
    be swallowed: the code that drops a module's lock is a callback, out of which Python lets no error.
    """
    del signum
    is_importing = frame is not None and frame.f_code.co_filename == _IMPORT_CODE
    if is_importing:
        signal.signal(signal.SIGALRM, strike)
    # Zero stops the timer: one interrupt is not to strike twice.
    signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS if is_importing else 0)
    if not is_importing:
        raise KeyboardInterrupt


@contextlib.contextmanager
def as_keyboard_interrupt() -> Iterator[None]:
    """Raise an interrupt of the block as KeyboardInterrupt, also where Python hides it.

    An interrupt that arrives while a condition takes its lock again leaves ``threading`` as a RuntimeError, ``release
    unlocked lock``, with the KeyboardInterrupt as its context.

    Raises:
        KeyboardInterrupt: the block was interrupted.
    """
    try:
        yield
    except RuntimeError as exc:
        reason = exc.__context__
        while reason is not None:
            if isinstance(reason, KeyboardInterrupt):
                raise KeyboardInterrupt from exc
            reason = reason.__context__
        raise
