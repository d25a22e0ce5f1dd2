"""``tokenizer.json``, loaded by the library that engines load it with, where it can do no harm.

The library is written in Rust and fails by panics: it prints them on descriptor 2 itself, raises an exception that is no
`Exception`, and ends the process where a second one follows, all of which a stranger's file can bring about. So a file is
loaded by a process of its own first.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.io.files import open_for_reading
from lora_merge.io.streams import native_notes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS = 120.0
"""For one file; the largest vocabularies there are take two."""

_NOT_INSTALLED = 3

_LOAD = f"""\
import json, sys
try:
    from tokenizers import Tokenizer
except Exception as exc:
    print(exc, file=sys.stderr)
    sys.exit({_NOT_INSTALLED})
try:
    loaded = Tokenizer.from_buffer(sys.stdin.buffer.read())
    said = {{"n_tokens": loaded.get_vocab_size(with_added_tokens=True)}}
except BaseException as exc:
    said = {{"error": str(exc)[:300]}}
print(json.dumps(said))
"""


class TokenizerError(Exception):
    """The library does not load the file, or fails on a text."""


def n_tokens(path: Path) -> int:
    """Return how many tokens a tokenizer has, added ones included.

    Raises:
        TokenizerError: the library does not load it.
        ImportError: the library itself cannot be loaded.
        MemoryError: there is no memory for it.
    """
    environ = os.environ | {"RUST_BACKTRACE": "0", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-P", "-c", _LOAD]
    try:
        with open_for_reading(path) as file:
            done = subprocess.run(  # noqa: S603 - our own interpreter and text
                command, env=environ, stdin=file, capture_output=True, timeout=_SECONDS, check=False
            )
    except CheckpointError as exc:
        raise TokenizerError(exc.got) from exc
    except OSError as exc:
        raise MemoryError(f"no room for another process ({exc.strerror})") from exc
    except subprocess.TimeoutExpired as exc:
        raise TokenizerError(f"takes more than {_SECONDS:.0f} seconds") from exc
    errors = done.stderr.decode("utf-8", "backslashreplace").strip()
    if done.returncode == _NOT_INSTALLED:
        raise ImportError(errors)
    if "memory allocation of" in errors:  # what Rust prints before it ends the process for want of it
        raise MemoryError(errors)
    try:
        said = json.loads(done.stdout)
    except ValueError:
        raise TokenizerError(f"ends the process that loads it (exit code {done.returncode})") from None
    if "error" in said:
        raise TokenizerError(said["error"])
    return int(said["n_tokens"])


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """Turn a panic of the library into an error, and what it prints into notes.

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
