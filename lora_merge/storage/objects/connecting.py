"""Connections to buckets through the package obstore: one for each bucket and process.

Credentials are found by the libraries: `AWS_*`, `GOOGLE_*` and `AZURE_*` variables, files, and the machine's own
identity. With boto3 installed, also profiles and single sign-on of AWS.
"""

from __future__ import annotations

import os
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

    from lora_merge.storage.objects.urls import StoreScheme, StoreUrl

MAX_RETRIES, RETRY_SECONDS = 10, 180
"""Of one request; obstore waits 0.1 s and up to 15 s between the tries."""

_TIMEOUT = "90s"
"""Of one request with its body. obstore's own 30 s would be too short for a part of 16 MiB on a slow line."""


def endpoint_of(scheme: StoreScheme) -> str:
    """Return the endpoint that the environment names for a kind of store; empty: the cloud's own."""
    names = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "gs": ("GOOGLE_BASE_URL",),
        "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        "file": (),
    }[scheme]
    return next((value for name in names if (value := os.environ.get(name))), "")


def bucket_of(url: StoreUrl) -> ObjectStore:
    """Return the connection to a URL's bucket; of files, to the root of this machine's.

    Raises:
        Exception: as obstore raises them, where no store can be made from the environment.
    """
    return _connected(url.scheme, url.bucket, settings_of(url.scheme))


def settings_of(scheme: StoreScheme) -> frozenset[tuple[str, str]]:
    """Return the variables of the environment that say how a kind of store is reached. They hold secrets."""
    start = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_", "file": "\0"}[scheme]
    return frozenset((name, value) for name, value in os.environ.items() if name.startswith(start))


@cache
def _connected(scheme: StoreScheme, bucket: str, settings: frozenset[tuple[str, str]]) -> ObjectStore:  # noqa: ARG001 - a key
    from obstore.store import AzureStore, GCSStore, LocalStore, S3Store

    endpoint = endpoint_of(scheme)

    if scheme == "file":
        return LocalStore(automatic_cleanup=True)
    # Whoever writes http:// into the endpoint has decided so already.
    options: ClientConfig = {"timeout": _TIMEOUT, "allow_http": endpoint.startswith("http://")}
    retries: RetryConfig = {"max_retries": MAX_RETRIES, "retry_timeout": timedelta(seconds=RETRY_SECONDS)}
    common: dict[str, Any] = {"client_options": options, "retry_config": retries}
    if endpoint and scheme == "s3":  # the variables that boto3 reads, with its precedence
        common["endpoint"] = endpoint
    if scheme == "s3":
        return S3Store(bucket, **common)
    if scheme == "gs":
        return GCSStore(bucket, **common)
    return AzureStore(bucket, **common)
