"""The journal of a run: one line for each written tensor, so that another run can resume.

The first line says whose it is. Nothing in a journal is believed: what it lists is looked at again before it counts.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import astuple
from typing import TYPE_CHECKING, Any, Self

from lora_merge.core.tensor import Survival, TensorRecord
from lora_merge.errors import WriteError
from lora_merge.storage.writing import write_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from lora_merge.storage.folder import Folder

FILE, FRESH_FILE = "journal.jsonl", "journal.new"
"""In staging: the journal, and one that is about to take its place."""

_VERSION = 4


class Journal:
    """A journal that is being written.

    A context; each line is with the kernel when `add` returns, so that a killed process has lost none.

    Args:
        home: the staging directory; a journal that is there is replaced.
        fingerprint: of the merge.
        records: of what is written already.
        changed: when each input changed last (ctime, nanoseconds); those are left out that may change without a trace.

    Raises:
        WriteError: it cannot be written.
    """

    def __init__(
        self,
        home: Folder,
        fingerprint: str,
        records: Iterable[TensorRecord] = (),
        changed: Mapping[str, int] | None = None,
    ) -> None:
        self._path = home.path / FILE
        head = {
            "journal": _VERSION,
            "merge": fingerprint,
            "process": os.getpid(),
            "host": os.uname().nodename,
            "changed": dict(changed or {}),
        }
        # Written beside the old journal and renamed over it: at every moment there is one whole journal.
        home.remove(FRESH_FILE)
        with contextlib.ExitStack() as stack:
            self._fd = stack.enter_context(home.writing(FRESH_FILE, create=True))
            try:
                self._write([head, *map(astuple, records)])
            except OSError as exc:
                raise write_error(self._path, exc) from exc
            home.rename(FRESH_FILE, FILE)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, records: Iterable[TensorRecord]) -> None:
        """Append the records of written tensors.

        Raises:
            WriteError: it cannot be written.
        """
        try:
            self._write(map(astuple, records))
        except OSError as exc:
            raise write_error(self._path, exc) from exc

    def _write(self, rows: Iterable[object]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        # One write may take a part only. No fsync: a crash of the machine may lose lines, and --resume
        # believes none unread.
        while text:
            text = text[os.write(self._fd, text) :]


def read(home: Folder, fingerprint: str) -> list[TensorRecord] | None:
    """Return the records that a journal lists; None where there is no journal, or it is of another merge.

    A last line that a killed process did not finish is left out.
    """
    lines = _lines(home)
    # Another fingerprint: other inputs, options or versions. None of it counts.
    if not lines or lines[0].get("merge") != fingerprint:
        return None
    return [record for record in map(record_of, lines[1:]) if record]


def changed(home: Folder) -> dict[str, int]:
    """Return path → ctime in nanoseconds of the inputs of the run that wrote a journal, of those that it could rely
    on.
    """
    head: dict[str, Any] = next(iter(_lines(home)), {})
    found = head.get("changed")
    return found if isinstance(found, dict) else {}


def count(home: Folder) -> int:
    """Return the number of tensors that a journal lists, finished lines only."""
    return max(len(_lines(home)) - 1, 0)


def owner(home: Folder) -> str:
    """Return the process and the host that write a journal, in words; empty where it does not say."""
    head: dict[str, Any] = next(iter(_lines(home)), {})
    return f"process {head['process']} on {head['host']}" if {"process", "host"} <= head.keys() else ""


def _lines(home: Folder) -> list[Any]:
    """Return the values of a journal's complete lines, the first one its head; empty where it cannot be read."""
    values: list[Any] = []
    try:
        text = home.read(FILE)
    except WriteError:  # it is gone
        return values
    with contextlib.suppress(ValueError, RecursionError):
        # A line without its end was cut by a kill. A broken line ends what counts.
        for line in text.split(b"\n")[:-1]:
            values.append(json.loads(line))  # noqa: PERF401 - what comes before a broken line counts
    return values if values and isinstance(values[0], dict) and values[0].get("journal") == _VERSION else []


def record_of(row: Any) -> TensorRecord | None:
    """Return the record that `dataclasses.astuple` and JSON made a row of; None for a row of another form."""
    # Anything may be in the file: a row of another form is not a record.
    match row:
        case [
            str(name),
            str(file),
            int(nbytes),
            str(digest),
            bool(finite),
            norms,
            dict(sources),
            suspects,
            blocks,
        ]:
            with contextlib.suppress(TypeError, ValueError):
                survival = None if norms is None else Survival(*map(float, norms))
                ranges = None if suspects is None else tuple((int(a), int(b)) for a, b in suspects)
                pieces = tuple((int(at), int(size), str(text)) for at, size, text in blocks)
                read = {str(role): str(text) for role, text in sources.items()}
                return TensorRecord(name, file, nbytes, digest, finite, survival, read, ranges, pieces)
    return None
