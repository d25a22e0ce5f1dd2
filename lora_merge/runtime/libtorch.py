"""Torch's own library, loaded beside Python's work: the dynamic linker needs a quarter of a second for it, and no interpreter.

`import torch` does the same while it holds the interpreter's lock. Afterwards it finds the library loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.runtime.shortage import is_limited

if TYPE_CHECKING:
    from collections.abc import Sequence

_LIBRARIES = (("libtorch_global_deps.so", "RTLD_GLOBAL"), ("libtorch_cpu.so", "RTLD_LOCAL"))
"""In the order in which `import torch` loads them, and who sees their symbols (``torch._load_global_deps``)."""

_OTHERS = ("libtorch_cuda.so", "libtorch_hip.so", "libtorch_xpu.so")
"""Builds for these load libraries of other packages first, in another order: they are left to `import torch`."""

_LINKED = (
    "_bisect",
    "_blake2",
    "_bz2",
    "_contextvars",
    "_csv",
    "_ctypes",
    "_decimal",
    "_hashlib",
    "_heapq",
    "_lzma",
    "_pickle",
    "_posixsubprocess",
    "_queue",
    "_random",
    "_sha512",
    "_socket",
    "_struct",
    "array",
    "binascii",
    "zlib",
    "xxhash",
)
"""Modules in C that commands import meanwhile. Each would wait for the dynamic linker, which loads one library at a time."""

_loading: list[threading.Thread] = []


def load_beside() -> None:
    """Begin to load the library in a thread. Where it cannot be loaded this way nothing is said: `import torch` will say it."""
    # Under a limit of memory `import torch` is to fail where its error is understood. In a directory that was removed MKL ends the
    # process while it is loaded, and the command line has a sentence for that.
    if sys.platform != "linux" or "torch" in sys.modules or _loading or is_limited() or not _has_directory():
        return
    paths = _paths()
    if paths:
        for name in _LINKED:
            # Not every build of Python has all of them.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        # A daemon: a merge that is refused does not wait for it.
        _loading.append(threading.Thread(target=_load, args=(paths,), name="libtorch", daemon=True))
        _loading[0].start()


def _has_directory() -> bool:
    try:
        return Path.cwd().is_absolute()
    except OSError:
        return False


def wait() -> None:
    """Wait until the library is loaded, if that was begun. The interpreter is free meanwhile."""
    for thread in _loading:
        thread.join()


def _paths() -> list[Path]:
    """Return the libraries of the torch that `import torch` would take; none where its build needs more than these."""
    try:
        spec = importlib.util.find_spec("torch")
    except (ImportError, ValueError):
        return []
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place, "lib")
        if any((folder / name).exists() for name in _OTHERS):
            return []
        paths = [folder / name for name, _ in _LIBRARIES]
        if all(path.is_file() for path in paths):
            return paths
    return []


def _load(paths: Sequence[Path]) -> None:
    import ctypes

    # `ctypes.CDLL` would hold the interpreter's lock; a call of a function in C does not.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = [ctypes.c_char_p, ctypes.c_int], ctypes.c_void_p
    for path, (_, mode) in zip(paths, _LIBRARIES, strict=True):
        # Without the first the second would look for its libraries elsewhere.
        if not dlopen(os.fsencode(path), os.RTLD_NOW | getattr(os, mode)):
            return
