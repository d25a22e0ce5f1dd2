"""Small files, read and written whole: bytes, text and JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lora_merge.errors import CheckpointError
from lora_merge.storage import input_files
from lora_merge.storage.instead import instead_of
from lora_merge.storage.json_values import OddValueError, check_values
from lora_merge.storage.reading import BLOCK_BYTES, borrowed_block, read_some
from lora_merge.storage.sources import open_source
from lora_merge.storage.writing import write_error

if TYPE_CHECKING:
    from pathlib import Path

MAX_JSON_BYTES = 100_000_000
"""The most bytes of a JSON file: as many as a safetensors header may have. An index of 100 000 tensors has 10 MB."""


_MAX_JSON_VALUES = 16_000_000
"""The most values of a JSON text. Each takes some 60 bytes of memory, where ``[],`` is three bytes of text; a header
has ten values for each tensor.
"""


_SHOWN_CHARACTERS = 200
"""Characters of a key that a message shows."""


def read_bytes(path: str | Path, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a small file, and report them to `input_files`.

    Raises:
        CheckpointError: it cannot be read, is not a regular file, or is longer than `most` bytes.
    """
    with open_source(path) as source, borrowed_block() as block:
        if source.nbytes > most:
            raise CheckpointError(str(path), "", f"has {source.nbytes} bytes", f"at most {most}")
        parts, n_read = [], 0
        # Up to one byte more than allowed, which shows that there are too many.
        while n_more := read_some(source, block[: min(BLOCK_BYTES, most + 1 - n_read)], n_read):
            parts.append(bytes(block[:n_more]))
            n_read += n_more
    if n_read > most:  # it grew, or says that it has no bytes, as files of /proc do
        raise CheckpointError(str(path), "", f"has more than {most} bytes", f"at most {most}")
    content = b"".join(parts)
    input_files.tell_read(str(path), 0, content)
    return content


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the table in a small JSON file.

    Raises:
        CheckpointError: it is missing, too long to be meant, no JSON, names a key twice, holds no table, or a value that
            no field can hold.
    """
    text = read_bytes(path)
    try:
        value = parse_json(text, paths=True)
    except OddValueError as exc:
        raise CheckpointError(str(path), exc.subject, exc.got, exc.wanted) from exc
    except (ValueError, RecursionError) as exc:
        raise _no_json(path, exc) from exc
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "", f"holds a JSON {type(value).__name__}", "a table")
    return value


def _no_json(path: str | Path, exc: Exception) -> CheckpointError:
    """Return the error for a file that is not JSON: it says what the file is instead, or that it is incomplete."""
    what = instead_of(path)
    if what is not None:
        return CheckpointError(str(path), "", what.sentence, hint=what.hint)
    is_cut = isinstance(exc, json.JSONDecodeError) and exc.pos >= len(exc.doc.rstrip())
    hint = "download it again, or save it again: the file is incomplete" if is_cut else ""
    return CheckpointError(str(path), "", f"is not valid JSON ({exc})", hint=hint)


def read_text(path: Path) -> str:
    """Return the text of a small file; bytes that are not UTF-8 are replaced, CRLF becomes LF.

    Raises:
        CheckpointError: it cannot be read, or is too long.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    return text.replace("\r\n", "\n")


def parse_json(text: bytes, *, paths: bool = False) -> Any:
    """Return the value of a JSON text, checked for values that no field can hold.

    Args:
        text: of a file.
        paths: whether names of files that are not UTF-8 may be in it, as `write_text` writes them.

    Raises:
        ValueError: it is not JSON or not UTF-8, has too many values, a table has a key twice, or a value is one that
            no field can hold (`OddValueError`).
        RecursionError: it is nested too deeply.
    """
    # Counted before parsing: a small text can become gigabytes of Python objects.
    n_values = sum(map(text.count, (b",", b"[", b"{")))
    if n_values > _MAX_JSON_VALUES:
        raise ValueError(f"about {n_values} values, expected at most {_MAX_JSON_VALUES}")
    value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    check_values(text, value, paths=paths)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:_SHOWN_CHARACTERS]!r} occurs twice")
            seen.add(key)
    return table


def write_text(path: Path, text: str) -> None:
    """Write a new small text file, in UTF-8.

    A path of the user's need not be UTF-8: the bytes of it that are not become ``\\udcff`` here, which JSON reads as
    the same path again.

    Raises:
        WriteError: the disk is full or cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as exc:
        raise write_error(path, exc) from exc
