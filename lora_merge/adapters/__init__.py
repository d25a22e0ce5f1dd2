"""Adapter formats: a directory → `Adapter`. One reader per format; `FORMATS` is the table of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_merge.adapters.peft import CONFIG_FILE, WEIGHTS_FILE, read_peft
from lora_merge.errors import UnknownFormatError

if TYPE_CHECKING:
    from pathlib import Path

    from lora_merge.core.adapter import Adapter

FORMATS: Mapping[str, Callable[[Path], Adapter | None]] = {"peft": read_peft}

__all__ = ["FORMATS", "read"]


def read(root: Path) -> Adapter:
    """Return the adapter in a directory.

    Raises:
        UnknownFormatError: no format matches.
        ResolveError: its files are broken.
    """
    for reader in FORMATS.values():
        adapter = reader(root)
        if adapter is not None:
            return adapter
    found = sorted(path.name for path in root.iterdir())
    raise UnknownFormatError(str(root), found, [f"{CONFIG_FILE} and {WEIGHTS_FILE}"])
