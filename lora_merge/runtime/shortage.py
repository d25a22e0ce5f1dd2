"""Memory that runs out, in one sentence: Python, its imports, torch and native libraries all report it differently."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import sys
import threading
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
"""Phrases in a ``RuntimeError`` of torch's allocators for CPU and CUDA (torch 2.13), of file mappings, and of
Python's threads.
"""

MORE = "free memory, or raise the limit of the process (ulimit -v, or its control group)"
"""The hint where no option of the command reduces the memory that it needs."""

_LOADER_SAYS = re.compile(
    r"failed to map segment from shared object|cannot map zero-fill pages|cannot allocate memory|cannot create cache"
    r"|cannot create shared object descriptor",
    re.IGNORECASE,
)
"""Phrases in an ``ImportError`` or ``OSError`` of a library that could not be loaded because memory ran out (glibc 2.42,
elf/dl-load.c).
"""


def is_shortage(exc: BaseException) -> bool:
    """Return True when an error, or one that caused it, says that memory ran out.

    An import that fails because memory ran out often raises another error, whose cause is the first one.
    """
    seen: set[int] = set()
    found: BaseException | None = exc
    while found is not None and id(found) not in seen:
        if _says_shortage(found):
            return True
        seen.add(id(found))
        # An import replaces the error: the first one is its context, not its cause.
        found = found.__cause__ or (found.__context__ if isinstance(found, ImportError) else None)
    return False


def _says_shortage(exc: BaseException) -> bool:
    match exc:
        case MemoryError() | OutOfMemoryError():
            return True
        case OSError(errno=errno.ENOMEM):
            return True
        case SystemError():
            return "exception" in str(exc) and is_limited()
        case ImportError() | OSError() | RuntimeError():
            return bool(_ALLOCATORS_SAY.search(str(exc)) or _LOADER_SAYS.search(str(exc)))
    return is_limited() and _is_of_import(exc)


def _is_of_import(exc: BaseException) -> bool:
    """Return True when an import failed that did find its module. Under a limit such an import can fail with any
    error.
    """
    frames = traceback.walk_tb(exc.__traceback__)
    return not isinstance(exc, ModuleNotFoundError) and any(
        frame.f_code.co_filename.startswith("<frozen importlib") for frame, _ in frames
    )


def is_limited() -> bool:
    """Return True when the memory of this process has a limit (``ulimit -v`` or ``-d``).

    Then ``error return without exception set``, from a library in C that could not be set up, means that memory ran out.
    """
    try:
        import resource
    except ImportError:  # not Unix
        return False
    # Control groups are not asked: their limit ends the process by a kill, not by an error.
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


BLAS_BYTES = 80_000_000
"""What two threads take that multiply matrices by OpenBLAS for the first time, and a fourth more: it ends the process otherwise."""

_THREAD_BYTES = 20_000_000
"""What a new thread takes: its stack, 8 MB by default, and its first objects."""

_ARENA_MAX = -8
"""``M_ARENA_MAX`` of glibc's ``mallopt``."""


def need_room(nbytes: int, to: str) -> None:
    """Check that this process may have so much more memory, if it has a limit.

    Args:
        nbytes: that are about to be asked for, by something that does not survive a failure.
        to: what for: ``"load numpy"``.

    Raises:
        MemoryError: it may not.
    """
    if not is_limited():
        return
    try:
        # Mapped and given back at once: only address space is asked for, no page is touched.
        mmap.mmap(-1, nbytes).close()
    except OSError as exc:
        raise MemoryError(f"not enough memory to {to}") from exc


class _Room:
    """An import finder that finds nothing: before certain modules are loaded, it checks that there is memory for
    them.
    """

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Leave the module to the other finders.

        Raises:
            MemoryError: there is not enough memory for it.
        """
        del path, target
        if name in _ROOM_BYTES and name not in sys.modules:
            need_room(_ROOM_BYTES[name], f"load {name}")


_start = threading.Thread.start


def _start_with_room(thread: threading.Thread) -> None:
    """Start a thread if there is memory for it. One that finds none ends before it says that it has begun, and Python 3.11 waits for
    that for ever.

    Raises:
        MemoryError: there is not enough memory.
    """
    need_room(_THREAD_BYTES, "start a thread")
    _start(thread)


def mind_limits() -> None:
    """Prepare a process of this program alone for a limit of its memory. Call it before numpy is imported, and before the first thread.

    Libraries in C that meet the limit while they are loaded would end the process, or hang, without a message.
    """
    # OpenBLAS takes memory for each thread when it is loaded, and a thread of it waits for work by turning in circles. Workers share the
    # cores already.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if is_limited():
        # For each thread glibc sets 64 MB of addresses aside, which count. Other C libraries have no such function, and no need.
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
        sys.meta_path.insert(0, _Room())
        threading.Thread.start = _start_with_room  # type: ignore[method-assign, assignment]


def raise_if_out_of_memory(exc: BaseException) -> None:
    """Raise MemoryError if an error is one of memory. Call it before an error of a library is taken as one about its
    input.

    Raises:
        MemoryError: it ran out.
    """
    if is_shortage(exc):
        raise MemoryError(str(exc)) from exc


@contextlib.contextmanager
def translate_out_of_memory(doing: str, hint: str = "") -> Iterator[None]:
    """Raise an `OutOfMemoryError` that says what was being done, when memory runs out in the block.

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
