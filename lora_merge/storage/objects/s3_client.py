"""S3 through the package boto3: its session, with profiles and single sign-on, and its client. One for each process.

Needs the extra `s3`. Without it, S3 is reached through obstore alone.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any

from lora_merge.storage.objects.settings import (
    CONNECT_SECONDS,
    MAX_TRIES,
    READ_SECONDS,
    endpoint_of,
    settings_of,
)

MOST_CONNECTIONS = 64


@cache
def is_installed() -> bool:
    """Return True where boto3 and awscrt, which computes checksums, are installed. Nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("boto3", "awscrt"))


def is_public() -> bool:
    """Return True where the environment says that requests are not signed, as for buckets that everyone may read."""
    return os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in {"1", "true", "yes"}


def session() -> Any:
    """Return boto3's session for the environment as it is now.

    Raises:
        botocore.exceptions.BotoCoreError: a profile does not exist, or a file of settings cannot be read.
    """
    return _session(settings_of("s3"))


def client() -> Any:
    """Return boto3's client of S3 for the environment as it is now. Threads may share it.

    Raises:
        botocore.exceptions.BotoCoreError: settings cannot be used.
    """
    return _client(settings_of("s3"))


def endpoint() -> str:
    """Return the endpoint of the environment or of the profile; empty for AWS itself.

    Raises:
        botocore.exceptions.BotoCoreError: settings cannot be used.
    """
    named = endpoint_of("s3")
    found = named or str(client().meta.endpoint_url)
    return "" if not named and ".amazonaws.com" in found else found


def region() -> str:
    """Return the region of the environment or of the profile.

    Raises:
        botocore.exceptions.BotoCoreError: settings cannot be used.
    """
    return session().region_name or "us-east-1"


@cache
def _session(settings: frozenset[tuple[str, str]]) -> Any:
    import boto3

    known = dict(settings)
    # boto3 does not read AWS_REGION, as every other library of AWS does.
    return boto3.Session(region_name=known.get("AWS_REGION") or known.get("AWS_DEFAULT_REGION"))


@cache
def _client(settings: frozenset[tuple[str, str]]) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    named = endpoint_of("s3")
    config = Config(
        retries={"mode": "standard", "max_attempts": MAX_TRIES},
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        max_pool_connections=MOST_CONNECTIONS,
        tcp_keepalive=True,
        signature_version=UNSIGNED if is_public() else None,
        # Names of hosts that begin with a bucket need DNS that only AWS is sure to have.
        s3={"addressing_style": "path"} if named else {},
    )
    found = _session(settings)
    return found.client(
        "s3", endpoint_url=named or None, region_name=found.region_name or "us-east-1", config=config
    )
