"""The address of a Ray cluster, as people write it."""

from __future__ import annotations

import re

from lora_merge.words import shown

AUTO, LOCAL = "auto", "local"
"""The cluster that runs here, or that ``RAY_ADDRESS`` names; and one that is started on this machine for the run."""

_HOST_AND_PORT = re.compile(r"(?P<host>[^\s/:@]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})")


def parse_address(text: object) -> str:
    """Return ``auto``, ``local`` or ``HOST:PORT`` as it is.

    Example:
        >>> parse_address("10.0.0.5:6379")
        '10.0.0.5:6379'

    Raises:
        ValueError: it is something else.
    """
    if text in {AUTO, LOCAL} or _HOST_AND_PORT.fullmatch(str(text)):
        return str(text)
    if str(text).startswith("ray://"):
        raise ValueError(
            f"{shown(text)} is the address of Ray Client, which lora-merge does not use: run it in the cluster with ray job submit"
        )
    if str(text).startswith(("http://", "https://")):
        raise ValueError(
            f"{shown(text)} is the address of a dashboard, which ray job submit takes; expected HOST:6379, for example"
        )
    raise ValueError(
        f"{shown(text)} is not an address of a Ray cluster, expected auto, local or HOST:6379, for example"
    )


def host_and_port(address: str) -> tuple[str, int]:
    """Return the two parts of ``HOST:PORT``.

    Example:
        >>> host_and_port("[::1]:6379")
        ('::1', 6379)
    """
    match = _HOST_AND_PORT.fullmatch(address)
    assert match is not None
    return match["host"].strip("[]"), int(match["port"])
