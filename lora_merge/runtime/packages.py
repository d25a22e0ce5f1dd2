"""Packages that a plain merge does without: checks that one can be used, and says in one sentence why not."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge.errors import PackageError
from lora_merge.runtime.shortage import raise_if_out_of_memory

_SHOWN_CHARACTERS = 200
"""Of a library's own words about an import that failed."""


@dataclass(frozen=True, slots=True)
class Package:
    """An optional package."""

    name: str
    """Of the distribution, and of its top module."""

    shown: str
    """Its name in sentences."""

    extra: str
    """The extra of lora-merge that installs it."""

    oldest: str
    """The oldest release that works; `pyproject.toml` has the same bound."""


PACKAGES: Mapping[str, Package] = {
    package.name: package
    for package in (
        Package("transformers", "transformers", "full", "5.23"),
        Package("peft", "PEFT", "full", "0.21"),
        Package("gguf", "the package gguf", "gguf", "0.19"),
        Package("obstore", "the package obstore", "objects", "0.12"),
        Package("boto3", "the package boto3", "s3", "1.40"),
        Package("ray", "the package ray", "ray", "2.49"),
    )
}
"""The packages that `require` knows."""

_USABLE: dict[str, Any] = {}
"""Packages that were found usable → their top module."""


def require(name: str, feature: str) -> Any:
    """Return the top module of an optional package.

    Args:
        name: a key of `PACKAGES`.
        feature: what needs it, as the subject of a sentence in the singular: ``"merging a BOFT adapter"``.

    Raises:
        PackageError: it is missing, too old, or fails when it is imported.
    """
    problem = problem_of(name)
    if problem:
        package = PACKAGES[name]
        hint = f'pip install "lora-merge[{package.extra}]"'
        raise PackageError(f"{feature} needs {package.shown}{problem}", hint)
    return _USABLE[name]


def problem_of(name: str) -> str:
    """Return why an optional package cannot be used, as the end of a sentence about it; empty where it can.

    Imports it, which may take seconds.

    Example:
        >>> problem_of("peft")  # doctest: +SKIP
        ', which is not installed'
    """
    # What is checked once stays so, unless another module took its place.
    known = _USABLE.get(name)
    return "" if known is not None and sys.modules.get(name) is known else _load(name)


def _load(name: str) -> str:
    """Import a package. Return why it cannot be used; empty where it can."""
    package = PACKAGES[name]
    try:
        module = importlib.import_module(name)
    except Exception as exc:  # noqa: BLE001 - a package that is half installed may raise anything
        raise_if_out_of_memory(exc)
        # A module that the package itself imports may be the missing one: then the package is broken, not missing.
        if isinstance(exc, ModuleNotFoundError) and exc.name == name:
            return ", which is not installed"
        found = version_of(name)
        if found and release_numbers(found) < release_numbers(package.oldest):
            return _too_old(package, found)
        first = next(iter(str(exc).strip().splitlines()), "")[:_SHOWN_CHARACTERS]
        return f", which is installed, but its import fails ({type(exc).__name__}: {first})"
    found = version_of(name)
    if found and release_numbers(found) < release_numbers(package.oldest):
        return _too_old(package, found)
    _USABLE[name] = module
    return ""


def _too_old(package: Package, found: str) -> str:
    return f" {package.oldest} or newer, and version {found} is installed"


def version_of(name: str) -> str:
    """Return the version of an installed distribution; empty where its metadata is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def release_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a release.

    Example:
        >>> release_numbers("5.23.0.dev0"), release_numbers("0.21rc1") < release_numbers("0.21.1")
        ((5, 23, 0), True)
    """
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
