"""The output that is to be verified: a directory, or a folder of a store or of the Hub, whose weights are read where they are."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE, INDEX_FILE
from lora_merge.errors import ResolveError
from lora_merge.formats.recognise import fault_of, names_in
from lora_merge.formats.side_files import CARD_FILE, MANIFEST_FILE, belongs_to_adapter, belongs_to_base
from lora_merge.formats.written_checkpoint import Output, read_output
from lora_merge.storage.hub import open_streamed
from lora_merge.storage.local_copies import LocalCopy
from lora_merge.storage.objects.local_copies import local_copy
from lora_merge.storage.objects.urls import parse_store_url
from lora_merge.storage.source import parse_source
from lora_merge.storage.user_paths import real_path, user_path

if TYPE_CHECKING:
    from collections.abc import Collection

    from lora_merge.core.report import Observer
    from lora_merge.storage.hub import Access

_HINT = "pass the output directory of a merge"
_OF_REPOS = ".gitattributes"
"""Every repo of the Hub has this file."""

_FILES = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, CARD_FILE)


@dataclass(frozen=True, slots=True)
class Existing:
    """An output as it was found."""

    output: Output

    stored: frozenset[str] = frozenset()
    """Names of the files that are in the store; empty for a directory."""

    copy: LocalCopy | None = None
    """Its small files, where it is in a store: they are there for as long as this is."""

    @property
    def label(self) -> str:
        """What it is called."""
        return self.output.root if self.copy is None else self.copy.text


def find_output(out: str, access: Access, watch: Observer) -> Existing:
    """Return what is at a path or a URL. One that may not be read is an error, not a damaged output.

    Args:
        out: a directory, the URL of a folder in a store, or ``hf://org/name``.
        access: how the Hub may be asked.
        watch: hears of downloads of small files.

    Raises:
        RequestError: it is a URL of a store, and a wrong one.
        ResolveError: nothing is there, it cannot be read, or it is something else.
    """
    url = parse_store_url(out)
    if url is not None:
        return _of_copy(local_copy(url, watch))
    source = parse_source(out)
    if source is not None and source.explicit and source.host == "hf":
        return _of_copy(open_streamed(source, access, watch)[1])
    return _in_directory(out)


def _in_directory(out: str) -> Existing:
    root = user_path(out)
    try:
        exists = root.exists()
        if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as exc:
        raise ResolveError(f"{out}: cannot be read ({(exc.strerror or str(exc)).lower()})") from exc
    if not root.is_dir():
        what = "is a file, expected a directory" if exists else "this directory does not exist"
        raise ResolveError(f"{out}: {what}", hint=_HINT)
    _check_kind(out, names_in(root))
    return Existing(read_output(real_path(root)))


def _of_copy(copy: LocalCopy) -> Existing:
    _check_kind(copy.text, copy.names)
    names = copy.names - {_OF_REPOS}
    small = {name for name in names if belongs_to_base(name) or belongs_to_adapter(name)}
    root = copy.fetch(small | names.intersection(_FILES))
    return Existing(read_output(root, copy.text, names), names, copy)


def _check_kind(out: str, names: Collection[str]) -> None:
    """Check that some files can be those of an output.

    Raises:
        ResolveError: they are something else.
    """
    if not {MANIFEST_FILE, CONFIG_FILE} & set(names) and (fault := fault_of(names, "base")) is not None:
        raise ResolveError(f"{out}: {fault.sentence}", hint=_HINT)
