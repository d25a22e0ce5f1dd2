"""Packages that lora-merge needs or can use, by its own metadata; nothing is imported."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lora_merge.diagnosis.facts import Engine, Package
from lora_merge.runtime.packages import version_of

if TYPE_CHECKING:
    from collections.abc import Iterable

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)[^;>]*(?:>=(?P<oldest>[\w.]+))?[^;]*(?:;.*extra == ['\"](?P<extra>\w+)['\"])?"
)

_PURPOSES: Final = {
    "peft": "adapters other than LoRA, and verify --forward",
    "transformers": "adapters other than LoRA, and verify --forward",
    "gguf": "convert --for llamacpp",
    "modelscope": "repos of ModelScope (ms://…)",
    "obstore": "object stores (s3://…, gs://…, az://…)",
    "boto3": "profiles of AWS, and copies that S3 makes by itself",
    "ray": "--executor ray",
    "matplotlib": "inspect --plot FILE.png or FILE.svg",
}
_EVERY = "every merge"
_EXTRAS: Final = ("", "full", "gguf", "modelscope", "objects", "plot", "ray", "s3")
_BESIDE: Final = ("accelerate", "bitsandbytes", "triton")
"""Packages that lora-merge does not ask for; their versions help to understand a report."""

_ENGINES: Final = ("vllm", "lmdeploy", "sglang", "mlx-lm", "llama-cpp-python")


def packages(requirements: Iterable[str] | None = None) -> tuple[Package, ...]:
    """Return the packages that lora-merge asks for, required ones first, and some beside them that are installed.

    Args:
        requirements: as metadata has them; by default, those of the installed lora-merge.
    """
    found = [_package(text) for text in (_own_requirements() if requirements is None else requirements)]
    wanted = {one.name: one for one in reversed(found) if one is not None}
    listed = sorted(wanted.values(), key=lambda one: (_EXTRAS.index(one.extra), one.name.lower()))
    beside = [Package(name, version_of(name), "", "beside", "") for name in _BESIDE if name not in wanted]
    return (*listed, *(one for one in beside if one.version))


def _own_requirements() -> list[str]:
    try:
        return importlib.metadata.requires("lora-merge") or []
    except importlib.metadata.PackageNotFoundError:
        return _requirements_of_source()


def _requirements_of_source() -> list[str]:
    """Return the requirements of a source tree that is not installed, as metadata would have them; none elsewhere."""
    import tomllib

    try:
        text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
    except (OSError, ValueError, KeyError):
        return []
    extras = project.get("optional-dependencies", {}).items()
    more = [f"{text}; extra == '{extra}'" for extra, texts in extras for text in texts]
    return [*project.get("dependencies", []), *more]


def _package(requirement: str) -> Package | None:
    """Return the package of one requirement; None for what only development needs.

    Example:
        >>> _package("gguf>=0.19; extra == 'gguf'").oldest
        '0.19'
    """
    match = _REQUIREMENT.match(requirement)
    if match is None or (match["extra"] or "") not in _EXTRAS:
        return None
    name, extra = match["name"], match["extra"] or ""
    return Package(name, version_of(name), match["oldest"] or "", extra, _PURPOSES.get(name, _EVERY))


def engine_packages() -> tuple[Engine, ...]:
    """Return the engines that are installed in this environment."""
    return tuple(Engine(name, version, "") for name in _ENGINES if (version := version_of(name)))
