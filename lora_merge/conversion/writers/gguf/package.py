"""Imports the package gguf, an optional dependency."""

from __future__ import annotations

from typing import Any

from lora_merge.errors import RequestError
from lora_merge.runtime.shortage import raise_if_out_of_memory


def gguf_package() -> Any:
    """Return the package gguf.

    Raises:
        RequestError: it is not installed.
    """
    try:
        import gguf
    except ImportError as exc:
        raise_if_out_of_memory(exc)
        hint = 'pip install "lora-merge[gguf]"'
        raise RequestError(
            "", 0, "format", "gguf needs the package gguf, which is not installed", hint=hint
        ) from exc
    return gguf
