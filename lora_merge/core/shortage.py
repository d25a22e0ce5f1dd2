"""Memory that runs out, in one sentence: Python and torch say it in ways of their own."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING

from lora_merge.errors import OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TORCH_SAYS = re.compile(
    r"not enough memory|can't allocate memory|can't start new thread|out of memory", re.IGNORECASE
)
"""In the ``RuntimeError`` of torch's allocators for CPU and CUDA (torch 2.13), and of Python's for threads."""


@contextlib.contextmanager
def memory_for(doing: str) -> Iterator[None]:
    """Name what the memory was for, when it runs out in the block.

    Args:
        doing: ``merging model.layers.0.mlp.up_proj.weight``.

    Raises:
        OutOfMemoryError: it ran out.
    """
    try:
        yield
    except MemoryError as exc:
        raise OutOfMemoryError(doing) from exc
    except RuntimeError as exc:
        if not _TORCH_SAYS.search(str(exc)):
            raise
        raise OutOfMemoryError(doing, "the GPU" if "CUDA" in str(exc) else "the machine") from exc
