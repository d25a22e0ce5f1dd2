"""Lets no test, and no process that a test starts, speak to a network: what tries is refused and written down.

Python imports a module of this name at its start when its folder is in PYTHONPATH. ``SOCKET_LOG`` names the file that attempts
are written to, since whoever asks may swallow the refusal; without it nothing is refused. ``SOCKETS=loopback`` allows servers of
the suite's own on this machine. Sockets with a name in the file system (AF_UNIX) connect processes of one machine: no network.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_EVENTS = frozenset(
    {
        "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto",
        "socket.sendmsg",
    }
)  # fmt: skip
_LOOPBACK = ("127.", "::1", "localhost")


def _host(event: str, arguments: tuple[object, ...]) -> str | None:
    """Return the host that is asked for; None where there is none."""
    named = arguments[1] if event in {"socket.connect", "socket.sendto", "socket.sendmsg"} else arguments[0]
    host = named[0] if isinstance(named, tuple) and named else named
    if isinstance(named, tuple):
        return str(host)
    if event.startswith("socket.get") and host is not None:
        return host.decode() if isinstance(host, bytes) else str(host)
    return None


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Refuse an event that speaks to a network, and write it down."""
    if event not in _EVENTS or "SOCKET_LOG" not in os.environ:
        return
    host = _host(event, arguments)
    if host is None or (os.environ.get("SOCKETS") == "loopback" and host.startswith(_LOOPBACK)):
        return
    with Path(os.environ["SOCKET_LOG"]).open("a", encoding="utf-8") as log:
        log.write(f"{event} {host} in {sys.argv}\n")
    raise PermissionError(f"no test speaks to a network: {event} {host}")


sys.addaudithook(_refuse)
