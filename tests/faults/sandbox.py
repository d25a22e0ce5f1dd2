"""Have the kernel refuse some calls to a program, as a filesystem or a sandbox would: ``sandbox.py ERRNO NAMES PROGRAM …``.

The calls fail in the kernel itself (seccomp), so the C library and Python do what they do on such a machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys

NUMBERS = {
    "x86_64": {
        "fallocate": 285, "fadvise64": 221, "flock": 73, "pwritev2": 328, "preadv2": 327, "renameat2": 316,
        "fsync": 74, "ioctl": 16, "fchmod": 91, "statfs": 137, "fstatfs": 138,
    },
    "aarch64": {
        "fallocate": 47, "fadvise64": 223, "flock": 32, "pwritev2": 287, "preadv2": 286, "renameat2": 276,
        "fsync": 82, "ioctl": 29, "fchmod": 52, "statfs": 43, "fstatfs": 44,
    },
}  # fmt: skip
"""Of the calls, by machine."""

_NO_NEW_PRIVS, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUALS, _RETURN = 0x20, 0x15, 0x06
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000


def is_able() -> bool:
    """Return True where the calls of this machine are known."""
    return sys.platform == "linux" and platform.machine() in NUMBERS


def refuse(code: int, names: list[str]) -> None:
    """Have calls fail from now on, in this process and those that it starts."""
    numbers = [NUMBERS[platform.machine()][name] for name in names]
    rows = [(_LOAD, 0, 0, 0)]
    for number in numbers:
        rows += [(_EQUALS, 0, 1, number), (_RETURN, 0, 0, _ERRNO | code)]
    rows.append((_RETURN, 0, 0, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *row) for row in rows))
    libc = ctypes.CDLL(None, use_errno=True)
    head = ctypes.create_string_buffer(struct.pack("@HP", len(rows), ctypes.addressof(program)))
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, head, 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp here")


def main() -> None:
    """Refuse, and become the program."""
    code, names, *program = sys.argv[1:]
    refuse(int(code), names.split(","))
    os.execv(program[0], program)


if __name__ == "__main__":
    main()
