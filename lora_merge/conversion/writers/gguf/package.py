"""Imports the package gguf, an optional dependency."""

from __future__ import annotations

from typing import Any

from lora_merge.runtime.packages import require


def gguf_package() -> Any:
    """Return the package gguf.

    Raises:
        PackageError: it cannot be used here.
    """
    return require("gguf", "--format gguf")
