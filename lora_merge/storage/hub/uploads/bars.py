"""Switches off the progress bars of huggingface_hub: this program shows one of its own."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

from lora_merge.runtime.borrowed import Borrowed

if TYPE_CHECKING:
    from collections.abc import Iterator


def _are_off() -> bool:
    from huggingface_hub.utils import are_progress_bars_disabled

    return bool(are_progress_bars_disabled())


def _switch(off: bool) -> None:
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    with warnings.catch_warnings():
        # The environment may have decided, and then the package warns that it cannot be changed.
        warnings.simplefilter("ignore")
        (disable_progress_bars if off else enable_progress_bars)()


_OFF = Borrowed(_are_off, _switch, value=True)


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Have no bars while the block runs."""
    with _OFF.changed():
        yield
