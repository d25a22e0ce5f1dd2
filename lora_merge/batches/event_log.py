"""A log of a batch for programs: one line of JSON for each event."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from lora_merge.redaction import fit_json
from lora_merge.storage.writing import write_error

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.errors import WriteError


class EventLog:
    """A file to which lines are appended; earlier content stays. Threads may share it.

    It is a context manager. When `add` returns, the kernel has the line. After the first line that cannot be written,
    no more are written; `failure` says why, and the batch goes on.

    Raises:
        WriteError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.failure: WriteError | None = None
        self._path = path
        self._lock = threading.Lock()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            # Non-blocking for the opening: otherwise it would wait for the reader of a named pipe.
            self._fd = os.open(path, flags | os.O_NONBLOCK, 0o666)
            os.set_blocking(self._fd, True)
        except OSError as exc:
            raise write_error(path, exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def add(self, event: str, **values: object) -> None:
        """Append one line: the time (UTC), the event's name and values."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": event, **values}, ensure_ascii=False, default=str)
        text = (fit_json(line) + "\n").encode()
        with self._lock:
            try:
                while text and self.failure is None:
                    # A write may take a part of the line.
                    text = text[os.write(self._fd, text) :]
            except OSError as exc:
                self.failure = write_error(self._path, exc)
