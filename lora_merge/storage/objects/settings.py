"""How stores are reached: variables of the environment, and limits of requests."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_merge.storage.objects.urls import StoreScheme

MAX_TRIES, RETRY_SECONDS = 10, 180
"""Of one request. Clients wait 0.1 s and up to 15 or 20 s between the tries."""

CONNECT_SECONDS, READ_SECONDS = 5, 90
"""Until a server is reached, and until an answer is there. 30 s would be too short for a part of 16 MiB on a slow line."""

FIRST_TRIES, FIRST_SECONDS = 4, 10
"""Of the first request to a bucket, which is small: tries, and seconds until an answer is there. A wrong endpoint should not
take minutes to be named, whether it refuses connections or accepts them and never answers."""

PROBE = ".lora-merge-probe"
"""The name of an object that is asked for, begun, or made empty and deleted at once, to see how a store answers."""

_STARTS = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}


def endpoint_of(scheme: StoreScheme) -> str:
    """Return the endpoint that the environment names for a kind of store; empty: the cloud's own."""
    return next((value for name in _ENDPOINTS.get(scheme, ()) if (value := os.environ.get(name))), "")


def settings_of(scheme: StoreScheme) -> frozenset[tuple[str, str]]:
    """Return the variables of the environment that say how a kind of store is reached. They hold secrets."""
    start = _STARTS.get(scheme, "")
    return frozenset((name, value) for name, value in os.environ.items() if start and name.startswith(start))
