"""What a process of its own runs to load a ``tokenizer.json``: the library is compiled, and has no limits of its own.

It compiles regexes that a stranger wrote, and allocates what the file says; an interrupt is not heard meanwhile. The file's
bytes come by standard input; one line of JSON goes out: how many tokens it has, or why it does not load.
"""

from __future__ import annotations

import contextlib
import json
import sys

MEMORY_BYTES = 4 << 30
"""Of all that it may use. The largest tokenizers that are published take less than one."""

CPU_SECONDS = 60
"""The largest take three."""

NOT_INSTALLED = 3
"""The exit code where the library itself cannot be loaded."""


def main() -> None:
    """Load what comes in, with the library that lies in a given directory."""
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
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
