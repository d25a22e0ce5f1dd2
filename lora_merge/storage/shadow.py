"""A temporary directory for the small files of an output that goes elsewhere: they are checked here, and sent last."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.storage import dirs
from lora_merge.storage.folder import Folder

if TYPE_CHECKING:
    import contextlib


def shadow(held: contextlib.ExitStack) -> Folder:
    """Return a new temporary directory; it is removed with the stack."""
    path = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="lora-merge-")))
    fd = dirs.open_directory(path)
    held.callback(os.close, fd)
    return Folder.of(path, fd)
