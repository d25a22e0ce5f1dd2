"""A log for programs: one line of JSON for each thing that happens."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from lora_merge.io.files import write_error

if TYPE_CHECKING:
    from pathlib import Path


class EventLog:
    """A file that lines are added to; what was in it stays. It may be called from several threads.

    A context; each line is with the kernel when `add` returns.

    Raises:
        WriteError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as exc:
            raise write_error(path, exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def add(self, event: str, **values: object) -> None:
        """Add a line.

        Raises:
            WriteError: it cannot be written.
        """
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **values}, ensure_ascii=False, default=str) + "\n"
        text = line.encode("utf-8", "backslashreplace")
        try:
            with self._lock:
                while text:
                    text = text[os.write(self._fd, text) :]
        except OSError as exc:
            raise write_error(self._path, exc) from exc
