"""Run by a separate process to load a ``tokenizer.json``: the library itself has no limits.

It compiles untrusted regexes, allocates what the file says, and hears no interrupt meanwhile. The file's
bytes come by standard input. One line of JSON goes out: the number of tokens, or why the file does not load.
"""

from __future__ import annotations

import contextlib
import json
import sys

MEMORY_BYTES = 4 << 30
"""Address space of the process. The largest published tokenizers take less than 1 GB."""

CPU_SECONDS = 60
"""CPU seconds of the process; the largest published tokenizers take three."""

NOT_INSTALLED = 3
"""Exit code when the library itself cannot be loaded."""


def main() -> None:
    """Load the file from standard input with the library in the directory ``sys.argv[1]``, and print the answer."""
    _limit()
    content = sys.stdin.buffer.read()
    sys.path.append(sys.argv[1])
    try:
        from tokenizers import Tokenizer
    except ImportError as exc:
        sys.stderr.write(str(exc))
        sys.exit(NOT_INSTALLED)
    answer: dict[str, object]
    try:
        answer = {"tokens": Tokenizer.from_buffer(content).get_vocab_size(with_added_tokens=True)}
    except BaseException as exc:  # noqa: BLE001 - the library raises Exception itself, and panics as a BaseException
        answer = {"why": str(exc)[:1000]}
    sys.stdout.write(json.dumps(answer))


def _limit() -> None:
    try:
        import resource
    except ImportError:  # no Unix
        return
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        # No core dump of a process that a panic ends.
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
