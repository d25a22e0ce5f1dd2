"""Memory that runs out, in one sentence: Python, its imports and torch say it in ways of their own."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import sys
import traceback
from typing import TYPE_CHECKING

from lora_merge.errors import LoraMergeError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ALLOCATORS_SAY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|can't start new thread|out of memory|bad_alloc"
    r"|enforce fail at alloc_cpu|unable to mmap|mmap failed",
    re.IGNORECASE,
)
"""In the ``RuntimeError`` of torch's allocators for CPU and CUDA (torch 2.13), of the mapping of files, and of Python's for
threads."""

MORE = "free some, or allow the process more of it: what a shell sets with ulimit -v, or a control group"
"""What to do about it where nothing makes a command take less."""

_LOADER_SAYS = re.compile(
    r"failed to map segment from shared object|cannot map zero-fill pages|cannot allocate memory|cannot create cache"
    r"|cannot create shared object descriptor",
    re.IGNORECASE,
)
"""In the ``ImportError`` or ``OSError`` of a library that has no room to be loaded (glibc 2.42, elf/dl-load.c)."""


def is_shortage(exc: BaseException) -> bool:
    """Return True where an error says that memory ran out, or was raised for one that does.

    An import that fails for want of memory is often told by another error, which has the first for its cause.
    """
    seen: set[int] = set()
    found: BaseException | None = exc
    while found is not None and id(found) not in seen:
        if _says_shortage(found):
            return True
        seen.add(id(found))
        found = found.__cause__ or (found.__context__ if isinstance(found, ImportError) else None)
    return False


def _says_shortage(exc: BaseException) -> bool:
    match exc:
        case MemoryError() | OutOfMemoryError():
            return True
        case OSError(errno=errno.ENOMEM):
            return True
        case SystemError():
            return "exception" in str(exc) and _is_limited()
        case ImportError() | OSError() | RuntimeError():
            return bool(_ALLOCATORS_SAY.search(str(exc)) or _LOADER_SAYS.search(str(exc)))
    return _is_limited() and _is_of_import(exc)


def _is_of_import(exc: BaseException) -> bool:
    """Return True where an import failed that finds what it looks for: under a limit it does so in any way whatever."""
    frames = traceback.walk_tb(exc.__traceback__)
    return not isinstance(exc, ModuleNotFoundError) and any(
        frame.f_code.co_filename.startswith("<frozen importlib") for frame, _ in frames
    )


def _is_limited() -> bool:
    """Return True where the memory of this process has a limit of its own.

    Then ``error return without exception set``, of a library in C that could not be set up, is for want of it.
    """
    try:
        import resource
    except ImportError:  # no Unix, or nobody may read the module
        return False
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in limits)


_ROOM_BYTES = {
    "pydantic": 50_000_000,
    "numpy": 160_000_000,
    "scipy.linalg": 160_000_000,
    "scipy.linalg._fblas": 160_000_000,
    "torch": 700_000_000,
}
"""What has to be free before a module is imported that does not survive a failure: Rust and C++ end the process, OpenBLAS
tries for ever, and what torch leaves behind breaks the interpreter. Measured, and a third more: numpy 2.4 with one thread
takes 85 MB, torch 2.13 for CPUs 500 MB."""


class _Room:
    """A finder of modules that finds none: it looks for room before those are loaded that cannot do without."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave the module to other finders.

        Raises:
            MemoryError: there is no room for it.
        """
        del path, target
        if name in _ROOM_BYTES and name not in sys.modules:
            try:
                mmap.mmap(-1, _ROOM_BYTES[name]).close()
            except OSError as exc:
                raise MemoryError(f"no room to load {name}") from exc


def mind_limits() -> None:
    """Prepare this process for the limit that its memory may have; to be called before numpy is imported.

    Libraries in C that meet the limit while they are loaded would end the process, or hang, without a word.
    """
    if _is_limited():
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        sys.meta_path.insert(0, _Room())


def not_for_want_of_memory(exc: BaseException) -> None:
    """Raise again what has memory for its reason; for where any other error of a library says something of its input.

    Raises:
        MemoryError: it ran out.
    """
    if is_shortage(exc):
        raise MemoryError(str(exc)) from exc


@contextlib.contextmanager
def memory_for(doing: str, hint: str = "") -> Iterator[None]:
    """Name what the memory was for, when it runs out in the block.

    Args:
        doing: ``merging model.layers.0.mlp.up_proj.weight``.
        hint: what to do about it; empty for that of a merge.

    Raises:
        OutOfMemoryError: it ran out.
    """
    try:
        yield
    except LoraMergeError:
        raise
    except Exception as exc:
        if not is_shortage(exc):
            raise
        where = "the GPU" if "CUDA" in str(exc) else "the machine"
        raise OutOfMemoryError(doing, where, hint) from exc
