"""The Hub's cache, found by its environment variables and read as a directory: no package of a hub is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

_PREFIX = "models--"


def hub_cache(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the Hugging Face Hub's cache, which need not exist.

    Source: the page "Environment variables" of huggingface_hub's documentation.
    """
    for name, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if value := environ.get(name):
            return Path(os.path.expandvars(value)).expanduser() / below
    return Path("~/.cache/huggingface/hub").expanduser()


def cached_repos(*, adapters: bool, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return the names of models, or of adapters, in the Hub's cache: ``org/name``, in alphabetical order."""
    try:
        folders = sorted(hub_cache(environ).glob(f"{_PREFIX}*"))
    except OSError:
        return []
    return [
        folder.name.removeprefix(_PREFIX).replace("--", "/")
        for folder in folders
        if any(folder.glob(f"snapshots/*/{ADAPTER_CONFIG}")) == adapters
    ]
