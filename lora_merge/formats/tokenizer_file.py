"""Loads ``tokenizer.json`` with the library that engines use, in a process where it can do no harm.

The library is written in Rust and fails by panics. It prints them on descriptor 2, raises an exception that is not an
`Exception`, and ends the process at a second one; a untrusted file can cause all of this. So a separate process
loads the file first, within limits of time and memory.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.formats.tokenizer_script import MEMORY_BYTES, NOT_INSTALLED
from lora_merge.runtime.streams import native_notes
from lora_merge.storage.small_files import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCRIPT = Path(__file__).with_name("tokenizer_script.py")

_MOST_BYTES = 200_000_000
"""The most bytes of the file; the largest that are published have 35 MB."""

_SECONDS = 120.0
"""Wall seconds for one file; the largest known vocabularies take two."""


class TokenizerError(Exception):
    """The library cannot load the file, or fails on a text."""


def n_tokens(path: Path) -> int:
    """Return the number of tokens of a tokenizer, added ones included.

    Raises:
        TokenizerError: the library does not load it.
        ImportError: the library itself cannot be loaded.
        MemoryError: memory ran out.
        OSError: no process can be started for it.
    """
    environ = os.environ | {"RUST_BACKTRACE": "0"}
    found = importlib.util.find_spec("tokenizers")
    if found is None or found.origin is None:
        raise ImportError("the package tokenizers is not installed")
    # -I -S: nothing of the user's environment or of site-packages is imported; the script gets the one path
    # that it needs.
    command = [sys.executable, "-I", "-S", str(_SCRIPT), str(Path(found.origin).parents[1])]
    try:
        # Read here, by the watched reader, and sent by a pipe: the process opens no untrusted file.
        content = read_bytes(path, _MOST_BYTES)
        done = subprocess.run(  # noqa: S603 - our own interpreter and script
            command, env=environ, input=content, capture_output=True, timeout=_SECONDS, check=False
        )
    except CheckpointError as exc:
        raise TokenizerError(str(exc)) from exc
    except OSError as exc:
        if exc.errno not in {errno.ENOMEM, errno.EAGAIN}:
            raise
        # fork and exec answer ENOMEM or EAGAIN when there is no memory for a process.
        raise MemoryError(f"no other process could be started ({exc.strerror})") from exc
    except subprocess.TimeoutExpired as exc:
        raise TokenizerError(f"takes more than {_SECONDS:.0f} seconds") from exc
    return _answer(done)


def _answer(done: subprocess.CompletedProcess[bytes]) -> int:
    """Return the number of tokens that the process reported.

    Raises:
        TokenizerError: the library does not load the file, or needs more than the process may use.
        ImportError: the library itself cannot be loaded.
        MemoryError: this program has less memory than the process may use, and it was not enough.
    """
    errors = done.stderr.decode("utf-8", "backslashreplace").strip()
    # A fault of the installation, not of the file.
    if done.returncode == NOT_INSTALLED:
        raise ImportError(errors)
    if "memory allocation of" in errors and _has_less():  # what Rust prints before it ends the process
        raise MemoryError(errors)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        sentence = "loading it takes more than a minute or 4 GB, or crashes the process"
        raise TokenizerError(sentence) from None
    if "why" in said:
        raise TokenizerError(said["why"])
    return int(said["tokens"])


def _has_less() -> bool:
    """Return True when this program may use less memory than the process that loads a tokenizer."""
    try:
        import resource
    except ImportError:  # no Unix
        return True
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return limit != resource.RLIM_INFINITY and limit < MEMORY_BYTES


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """Turn a panic of the library into a `TokenizerError`, and what it prints into notes.

    Raises:
        TokenizerError: it panicked.
    """
    with native_notes():
        try:
            yield
        except BaseException as exc:
            if type(exc).__name__ != "PanicException":  # pyo3 gives it no other name that can be imported
                raise
            raise TokenizerError(str(exc)) from exc
