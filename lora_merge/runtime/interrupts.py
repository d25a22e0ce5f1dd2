"""Interrupts that strike inside Python's own locks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def whole_interrupts() -> Iterator[None]:
    """Let an interrupt come out of the block as one.

    One that strikes while a condition takes its lock again comes out of ``threading`` as a RuntimeError, ``release
    unlocked lock``, for which it is the reason.

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
