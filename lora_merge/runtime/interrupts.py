"""Interrupts that arrive while Python holds one of its own locks."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def whole_interrupts() -> Iterator[None]:
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
