"""Files of the Hugging Face Hub as a row of `storage.sources.SCHEMES`: texts are ``hf://ORG/NAME@COMMIT/FILE``."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

from lora_merge.errors import CheckpointError
from lora_merge.storage import input_files
from lora_merge.storage.hub.remote_file import remote_file
from lora_merge.storage.ranged import RangedSource
from lora_merge.storage.source import parse_hub_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.identity import FileIdentity
    from lora_merge.storage.hub.remote_file import RemoteFile
    from lora_merge.storage.sources import Source


class HubFiles:
    """Files of repos at a commit (a `storage.sources.Scheme`)."""

    @contextlib.contextmanager
    def open(self, text: str) -> Iterator[Source]:
        """Open a file for the length of a block.

        Raises:
            CheckpointError: it does not exist, or cannot be read.
        """
        remote = _found(text)
        # Known from the first opening: where the file is need not be asked again.
        known = input_files.known_version(text)
        try:
            version = known or remote.version()
        except FileNotFoundError:
            raise CheckpointError(text, "", "does not exist") from None
        source = RangedSource(text, version, partial(remote.fetch, version))
        try:
            yield source
        finally:
            source.close()

    def version_at(self, text: str) -> FileIdentity:
        """Return which version of a file has a name now.

        Raises:
            FileNotFoundError: it does not exist.
            CheckpointError: the Hub cannot be asked, or refuses.
        """
        return _found(text).version()


def _found(text: str) -> RemoteFile:
    file = parse_hub_file(text)
    if file is None:
        raise CheckpointError(text, "", "does not name a file of a repo at a commit")
    return remote_file(file)


HUB_FILES = HubFiles()
