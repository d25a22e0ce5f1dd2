"""A file that is written whole or not at all: under a separate name first, then under the one that is wanted."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a small file in UTF-8, or replace it. Whoever reads it meets the old text or the new one.

    Args:
        path: its place, links followed.
        text: its content.

    Raises:
        OSError: it cannot be written. What was there before is as it was.
    """
    staged = path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}")
    # 0o666 less the umask, as any program makes files. Nothing may have this name before.
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
