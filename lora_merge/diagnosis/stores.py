"""Object stores: where credentials for them would be taken from. Values are never read, and no service is asked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from lora_merge.diagnosis.facts import StoreAccess
from lora_merge.runtime.packages import version_of
from lora_merge.storage.user_paths import is_file

if TYPE_CHECKING:
    from collections.abc import Mapping


class _Way(NamedTuple):
    """One way to give credentials."""

    words: str
    needed: tuple[str, ...] = ()
    """Environment variables that all have to be set."""

    file: str = ""
    """A file that has to exist, below the home directory."""

    moved_by: str = ""
    """The variable that names another file."""

    package: str = ""
    """The package that reads it; empty where none is needed."""


_WAYS: Final[Mapping[str, tuple[_Way, ...]]] = {
    "s3": (
        _Way("environment variables", ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")),
        _Way("a web identity", ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN")),
        _Way("the container's role", ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",)),
        _Way("the container's role", ("AWS_CONTAINER_CREDENTIALS_FULL_URI",)),
        _Way("a profile", (), ".aws/credentials", "AWS_SHARED_CREDENTIALS_FILE", "boto3"),
        _Way("a profile", (), ".aws/config", "AWS_CONFIG_FILE", "boto3"),
    ),
    "gs": (
        _Way("a service account", ("GOOGLE_SERVICE_ACCOUNT",)),
        _Way("a service account", ("GOOGLE_SERVICE_ACCOUNT_PATH",)),
        _Way("a service account", ("GOOGLE_SERVICE_ACCOUNT_KEY",)),
        _Way(
            "application default credentials",
            (),
            ".config/gcloud/application_default_credentials.json",
            "GOOGLE_APPLICATION_CREDENTIALS",
        ),
    ),
    "az": (
        _Way("an account key", ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY")),
        _Way("a SAS token", ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_SAS_TOKEN")),
        _Way("a client secret", ("AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", "AZURE_TENANT_ID")),
        _Way("a workload identity", ("AZURE_CLIENT_ID", "AZURE_TENANT_ID", "AZURE_FEDERATED_TOKEN_FILE")),
        _Way("the Azure CLI", ("AZURE_USE_AZURE_CLI",)),
    ),
}
"""Scheme → ways in which credentials are given, the first ones preferred."""


def stores(environ: Mapping[str, str] = os.environ) -> tuple[StoreAccess, ...]:
    """Return where credentials of each kind of store were found; nothing where obstore is not installed."""
    if not version_of("obstore"):
        return ()
    return tuple(StoreAccess(f"{scheme}://", _found(ways, environ)) for scheme, ways in _WAYS.items())


def _found(ways: tuple[_Way, ...], environ: Mapping[str, str]) -> str:
    for way in ways:
        if way.needed and all(environ.get(name) for name in way.needed):
            return f"found: {way.words} ({', '.join(way.needed)})"
        if way.file and (place := _file_of(way, environ)):
            named = f"found: {way.words} ({place})"
            missing = bool(way.package) and not version_of(way.package)
            return f"{named}, which is read only with {way.package}" if missing else named
    return ""


def _file_of(way: _Way, environ: Mapping[str, str]) -> str:
    """Return how the file of a way is called, if it exists: the variable that names it, or its place; else nothing."""
    moved, home = environ.get(way.moved_by, ""), environ.get("HOME", "")
    path = Path(moved) if moved else Path(home, way.file)
    if not (moved or home) or not is_file(path):
        return ""
    return way.moved_by if moved else f"~/{way.file}"
