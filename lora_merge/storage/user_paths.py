"""Paths that users name: which path a text means, and what is there."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from lora_merge.errors import ResolveError
from lora_merge.storage.json_values import shown
from lora_merge.storage.objects.urls import is_like_url, parse_store_url

if TYPE_CHECKING:
    from pathlib import Path


def user_path(text: str) -> Path:
    """Return the path of a text; ``~`` and ``~name`` are home directories.

    Raises:
        ResolveError: there is no such user, or the text holds something that a path cannot have: a NUL character, or half of a
            character.
    """
    from pathlib import Path

    if "\0" in text:
        raise ResolveError(f"{text!r}: holds a NUL character, which a path cannot have", hint="remove it")
    try:
        os.fsencode(text)
        return Path(text).expanduser()
    except UnicodeEncodeError as exc:
        sentence = f"{shown(text)}: holds half of a character, which a path cannot have"
        raise ResolveError(sentence, hint="remove it") from exc
    except RuntimeError as exc:
        name = text.partition("/")[0]
        raise ResolveError(
            f"{text}: there is no user {name.removeprefix('~') or 'with a home directory'}",
            hint=f"write ./{name} if you mean a directory with this name",
        ) from exc


def file_in(folder: str, name: str) -> str:
    """Return the text that names a file of a folder, which is one of this machine or a URL.

    Raises:
        ResolveError: the folder cannot be a path.
        RequestError: it is a URL of a store, and a wrong one.
    """
    url = parse_store_url(folder)
    return str(user_path(folder) / name) if url is None else url.child(name)


def output_path(text: str) -> Path:
    """Return the absolute path of an output, links in its directory followed; the output's own name may be a link and
    stays one.

    Raises:
        ResolveError: it cannot be a path, or holds a shell variable that was not filled in.
    """
    if re.search(r"\$\w|\$\{", text):
        hint = "write the whole path: shell variables are not expanded here"
        raise ResolveError(f"{text}: contains a shell variable, expected a path", hint=hint)
    path = user_path(text)
    # One path for one place. A link in the place of the output itself is refused later (`replaceable`).
    return real_path(path.parent) / path.name if path.name not in {"", ".."} else real_path(path)


def local_output_path(text: str) -> Path:
    """Return the absolute path of an output that can only be a directory of this machine.

    Raises:
        ResolveError: as for `output_path`, or the text is written like a URL.
    """
    # A misspelt URL must not become a directory of this name: the merge would seem to be in the store.
    if is_like_url(text):
        sentence = f"{text}: is not a URL that an output can have"
        hint = f"write s3://, gs://, az:// or file:/// in small letters; a directory of this name is ./{text}"
        raise ResolveError(sentence, hint=hint)
    return output_path(text)


def real_path(path: Path) -> Path:
    """Return the absolute path of a place, with links followed as far as they lead.

    Raises:
        ResolveError: they lead in a circle, or the current directory was removed.
    """
    try:
        return path.resolve()
    except FileNotFoundError as exc:
        sentence = f"{path}: is relative, but the current directory was removed"
        raise ResolveError(sentence, hint="cd to another directory, or pass an absolute path") from exc
    except (OSError, RuntimeError) as exc:  # RuntimeError: a circle, up to Python 3.12
        why = exc.strerror if isinstance(exc, OSError) else "its links lead in a circle"
        raise ResolveError(f"{path}: cannot be followed ({why})") from exc


def is_directory(path: Path) -> bool:
    """Return True for a directory; False also where it cannot be looked at."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Return True for a file; False also where it cannot be looked at, or no file can have such a name."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_there(path: Path) -> bool:
    """Return True when something has this name, and may be seen."""
    try:
        return path.exists()
    except OSError:
        return False


def nearest_existing(path: Path) -> Path:
    """Return the path itself if it exists, or else the nearest directory above it that does."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            if place.exists():
                return place
    return path
