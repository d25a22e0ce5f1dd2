"""Connections to buckets through the package obstore: one for each bucket and process.

Credentials are found by the libraries: `AWS_*`, `GOOGLE_*` and `AZURE_*` variables, files, and the machine's own
identity. With boto3 installed, also profiles and single sign-on of AWS.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from lora_merge.storage.objects import s3_client
from lora_merge.storage.objects.failures import is_credentials_search, is_unreachable
from lora_merge.storage.objects.settings import (
    CONNECT_SECONDS,
    FIRST_SECONDS,
    FIRST_TRIES,
    MAX_TRIES,
    PROBE,
    READ_SECONDS,
    RETRY_SECONDS,
    endpoint_of,
    settings_of,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from lora_merge.storage.objects.urls import StoreScheme, StoreUrl

_LIFETIME = timedelta(minutes=9)
"""How long obstore keeps credentials that boto3 gave it. boto3 renews those of roles 10 minutes before they expire, and
obstore's own half an hour would use them beyond that."""


def bucket_of(url: StoreUrl) -> ObjectStore:
    """Return the connection to a URL's bucket; of files, to the root of this machine's.

    Raises:
        Exception: as the libraries raise them, where the environment's settings cannot be used or no server answers.
    """
    return _connected(url.scheme, url.bucket, settings_of(url.scheme))


@cache
def _connected(scheme: StoreScheme, bucket: str, settings: frozenset[tuple[str, str]]) -> ObjectStore:  # noqa: ARG001 - a key
    from obstore.store import LocalStore

    if scheme == "file":
        # A folder goes with its last file, as in the other stores, which have no folders.
        return LocalStore(automatic_cleanup=True)
    _ask(_opened(scheme, bucket, FIRST_TRIES, FIRST_SECONDS, 2 * FIRST_SECONDS))
    return _opened(scheme, bucket, MAX_TRIES, READ_SECONDS, RETRY_SECONDS)


def _opened(
    scheme: StoreScheme, bucket: str, tries: int, read_seconds: int, retry_seconds: int
) -> ObjectStore:
    """Return a connection that repeats requests up to a number of times and for some seconds. Nothing is asked yet."""
    from obstore.store import AzureStore, GCSStore, S3Store

    options: dict[str, Any] = {} if scheme != "s3" else _s3_options()
    endpoint = options.get("endpoint") or endpoint_of(scheme)
    options["retry_config"] = {"max_retries": tries, "retry_timeout": timedelta(seconds=retry_seconds)}
    options["client_options"] = {
        "timeout": f"{read_seconds}s",
        "connect_timeout": f"{CONNECT_SECONDS}s",
        # Whoever writes http:// into the endpoint has decided so already.
        "allow_http": endpoint.startswith("http://"),
    }
    if scheme == "s3":
        return S3Store(bucket, **options)
    return GCSStore(bucket, **options) if scheme == "gs" else AzureStore(bucket, **options)


def _s3_options() -> dict[str, Any]:
    """Return endpoint, region and credentials for S3: boto3's where it is installed, so that both clients agree."""
    if not s3_client.is_installed():
        # obstore finds the rest. It does not know this name's precedence over the others.
        named = endpoint_of("s3")
        return {"endpoint": named} if named else {}
    options: dict[str, Any] = {"region": s3_client.region()}
    if endpoint := s3_client.endpoint():
        options["endpoint"] = endpoint
    if not s3_client.is_public():
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider(s3_client.session(), ttl=_LIFETIME)
    return options


def _ask(first: ObjectStore) -> None:
    """Ask a store for something, to see that a server answers and that credentials are found.

    Raises:
        obstore.exceptions.GenericError: they are not.
    """
    import obstore

    try:
        # It needs no right in particular.
        obstore.head(first, PROBE)
    except (FileNotFoundError, PermissionError):
        return
    except obstore.exceptions.BaseError as exc:
        # What a server answers is told by the request that needs it, with its retries.
        if is_unreachable(str(exc)) or is_credentials_search(str(exc)):
            raise
