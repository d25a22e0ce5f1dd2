"""A store that fails: a server on loopback that passes requests on to a real one, and breaks some of them, by a seed."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUSY = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
DENIED = b'<?xml version="1.0"?><Error><Code>%s</Code><Message>no</Message><AWSAccessKeyId>AKIATESTTESTTESTTEST</AWSAccessKeyId></Error>'


@dataclass
class Faults:
    """Which requests break. Chances are of each request that the kind applies to."""

    seed: int = 0
    busy: float = 0.0
    """503 in place of an answer."""
    dropped: float = 0.0
    """The connection is closed before the request was passed on."""
    lost: float = 0.0
    """The same after it was passed on: the store has done it, and the client does not know."""
    cut: float = 0.0
    """The body of an answer ends in the middle."""
    damaged: float = 0.0
    """A byte of a body that is sent is changed on the way."""
    answer: tuple[int, str] | None = None
    """Status and code that every request is answered with."""

    answered: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    """Methods of the requests that are answered so."""

    no_checksums: bool = False
    """Requests that ask for checksums are refused, as by stores that do not know them."""
    most: int = 1 << 30
    """Faults altogether; afterwards everything works."""

    happened: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    sent_bytes: int = 0
    """Of all bodies that clients sent."""

    received_bytes: int = 0
    """Of all bodies that the server behind answered with."""

    def __post_init__(self) -> None:
        self._random, self._lock = random.Random(self.seed), threading.Lock()

    def strikes(self, kind: str) -> bool:
        """Return True where a fault of a kind happens now."""
        with self._lock:
            is_struck = self._random.random() < getattr(self, kind)
            if not is_struck or self.happened.total() >= self.most:
                return False
            self.happened[kind] += 1
            return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: tuple[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.faults.requests[self.command] += 1
        self.faults.sent_bytes += len(body)
        if self.faults.answer and self.command in self.faults.answered:
            status, code = self.faults.answer
            self._reply(status, DENIED % code.encode(), {"x-amz-bucket-region": "eu-west-1"})
        elif self.faults.no_checksums and "x-amz-checksum-algorithm" in self.headers:
            self._reply(501, DENIED % b"NotImplemented", {})
        elif self.faults.strikes("dropped"):
            self._hang_up()
        elif self.faults.strikes("busy"):
            self._reply(503, BUSY, {})
        else:
            self._pass_on(body)

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith("do_"):
            return self._any
        raise AttributeError(name)

    def _pass_on(self, body: bytes) -> None:
        if len(body) > 1000 and self.faults.strikes("damaged"):
            body = body[:500] + bytes([body[500] ^ 1]) + body[501:]
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in {"connection", "expect"}
        }
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            self.faults.received_bytes += len(content)
        finally:
            connection.close()
        if self.faults.strikes("lost"):
            self._hang_up()
            return
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP}
        self._reply(answer.status, content, kept, length=answer.getheader("Content-Length"))

    def _reply(self, status: int, content: bytes, headers: dict[str, str], length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        is_head = self.command == "HEAD"
        self.send_header(
            "Content-Length", length if is_head and length else str(0 if is_head else len(content))
        )
        self.end_headers()
        if is_head:
            return
        if len(content) > 1000 and self.faults.strikes("cut"):
            self.wfile.write(content[: len(content) // 2])
            self._hang_up()
        else:
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


_HOP = frozenset({"connection", "content-length", "transfer-encoding", "keep-alive"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients hang up, too."""


@contextlib.contextmanager
def failing(upstream: str, faults: Faults) -> Iterator[str]:
    """Run a server in front of another one; yield its URL."""
    where = urlsplit(upstream)
    handler = type("Handler", (_Handler,), {"faults": faults, "upstream": (where.hostname, where.port)})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
