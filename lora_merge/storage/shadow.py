"""A temporary directory for the small files of an output that goes elsewhere: they are checked here, and sent last."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_merge.runtime.temporary import temporary_folder
from lora_merge.storage import dirs
from lora_merge.storage.folder import Folder

if TYPE_CHECKING:
    import contextlib


def shadow(held: contextlib.ExitStack) -> Folder:
    """Return a new temporary directory; it is removed with the stack."""
    path = held.enter_context(temporary_folder())
    fd = dirs.open_directory(path)
    held.callback(os.close, fd)
    return Folder.of(path, fd)
