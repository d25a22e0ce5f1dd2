"""A hub on loopback that takes uploads: repos are created and written as with the Hub's own client, over LFS and over xet.

It is the hub of ``server.py`` besides: repos of files that are only read are served from the same address. Everything that is
written is kept in a directory, so that a hub can be started again with it. As a process of its own, for tests that kill:
``python -m tests.hub.uploads --root DIR --port 0 [--serve ORG/NAME=DIR]`` prints its URL. ``GET /_test/state`` says what it has,
``POST /_test/plan`` plans faults.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import asking, discussing, managing, storing
from tests.hub.asking import Answer, Asked, RefusedError
from tests.hub.server import _Handler
from tests.hub.taking import Account, Plan, TakingHub

REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
MODEL = rf"/api/models/{REPO}"
LFS = rf"/_lfs/{REPO}/(?P<oid>[0-9a-f]{{64}})"
BLOCK = 1 << 20

ENDPOINTS: dict[str, tuple[str, str, Callable[[Asked], Answer]]] = {
    "create": ("POST", "/api/repos/create", managing.create),
    "delete": ("DELETE", "/api/repos/delete", managing.delete),
    "whoami": ("GET", "/api/whoami-v2", managing.whoami),
    "validate-yaml": ("POST", "/api/validate-yaml", managing.validate),
    "auth-check": ("GET", rf"{MODEL}/auth-check(?P<write>/write)?", managing.may),
    "settings": ("PUT", rf"{MODEL}/settings", managing.settings),
    "branch": ("POST", rf"{MODEL}/branch/(?P<branch>[^/]+)", managing.branch),
    "delete-branch": ("DELETE", rf"{MODEL}/branch/(?P<branch>[^/]+)", managing.unbranch),
    "refs": ("GET", rf"{MODEL}/refs", managing.refs),
    "commits": ("GET", rf"{MODEL}/commits/{REVISION}", managing.commits),
    "tree": ("GET", rf"{MODEL}/tree/{REVISION}(?:/(?P<inside>.+))?", managing.tree),
    "paths-info": ("POST", rf"{MODEL}/paths-info/{REVISION}", managing.paths_info),
    "info": ("GET", rf"{MODEL}(?:/revision/{REVISION})?", managing.info),
    "resolve": ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<file>.+)", managing.resolve),
    "preupload": ("POST", rf"{MODEL}/preupload/{REVISION}", storing.preupload),
    "batch": ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", storing.batch),
    "put": ("PUT", LFS, storing.put),
    "part": ("PUT", rf"{LFS}/part/(?P<part>\d+)", storing.put),
    "complete": ("POST", rf"{LFS}/complete", storing.complete),
    "verify": ("POST", rf"{LFS}/verify", storing.verify),
    "xet-token": ("GET", rf"{MODEL}/xet-(?P<kind>read|write)-token/{REVISION}", storing.xet_token),
    "duplicate": ("POST", rf"{MODEL}/lfs-files/duplicate", storing.duplicate),
    "commit": ("POST", rf"{MODEL}/commit/{REVISION}", storing.commit),
    "discussions": ("GET", rf"{MODEL}/discussions", discussing.listed),
    "discuss": ("POST", rf"{MODEL}/discussions", discussing.opened),
    "discussion": ("GET", rf"{MODEL}/discussions/(?P<number>\d+)", discussing.details),
    "comment": ("POST", rf"{MODEL}/discussions/(?P<number>\d+)/comment", discussing.commented),
    "title": ("POST", rf"{MODEL}/discussions/(?P<number>\d+)/title", discussing.renamed),
    "status": ("POST", rf"{MODEL}/discussions/(?P<number>\d+)/status", discussing.turned),
    "merge": ("POST", rf"{MODEL}/discussions/(?P<number>\d+)/merge", discussing.merged),
}
"""What can be asked for, under the names that faults are planned for."""
UNSIGNED = frozenset({"put", "part", "complete"})
"""Their addresses are permission enough, as those of S3 are: clients send them no token."""


class _TakingHandler(_Handler):
    hub: TakingHub

    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # clients are killed
            super().handle()

    def do_POST(self) -> None:  # noqa: N802
        self._answer()

    def do_PUT(self) -> None:  # noqa: N802
        self._answer()

    def do_DELETE(self) -> None:  # noqa: N802
        self._answer()

    def _route(self) -> None:
        address = urlsplit(self.path)
        if address.path.startswith("/_test/"):
            self._test(address.path)
            return
        method = "GET" if self.command == "HEAD" else self.command
        for endpoint, (verb, pattern, act) in ENDPOINTS.items():
            found = re.fullmatch(pattern, _unquoted_revision(address.path)) if verb == method else None
            if found:
                path = {name: unquote(value) for name, value in found.groupdict().items() if value}
                if path.get("repo", "") not in self.hub.repos:
                    query = {name: values[0] for name, values in parse_qs(address.query).items()}
                    self._take(endpoint, path, query, act)
                    return
        super()._route()

    def _take(
        self, endpoint: str, path: dict[str, str], query: dict[str, str], act: Callable[[Asked], Answer]
    ) -> None:
        """Answer an endpoint of uploads, with what is planned to go wrong."""
        plan, pieces = self.hub.next_plan(endpoint), self._pieces()
        is_signed = endpoint not in UNSIGNED
        asked = Asked(self.hub, None, path, query, self._troubled(plan, pieces))
        try:
            answer = self._done(plan, asked, act, is_signed=is_signed)
            for _ in pieces:  # what was refused before it was read: the connection goes on behind it
                pass
        except ConnectionError:
            answer = None
        if plan.stall_after:
            self.hub.wait()
        self.hub.statuses.append((endpoint, 0 if answer is None or plan.lose else answer.status))
        if answer is None or plan.lose:
            self.close_connection = True
        elif answer.file:
            self._bytes(answer.file, dict(answer.headers), answer.name)
        else:
            self._json(answer.status, answer.table, dict(answer.headers))

    def _done(self, plan: Plan, asked: Asked, act: Callable[[Asked], Answer], *, is_signed: bool) -> Answer:
        """Do what was asked for, one request at a time but for the bytes of files; return the answer."""
        if plan.status:
            message = plan.message or (asking.TOO_MANY if plan.status == 429 else "on purpose")
            return RefusedError(plan.status, message, retry_after=plan.retry_after).answer
        try:
            if not is_signed:
                return act(asked)
            asked.who = self._who()
            asked.pieces = iter(list(asked.pieces))
            with self.hub.lock:
                return act(asked)
        except RefusedError as refused:
            return refused.answer

    def _who(self) -> Account | None:
        """Return whose token was sent; refuse one that is not known."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise RefusedError(401, asking.NO_CREDENTIALS)
        return self.hub.accounts.get(token)

    def _pieces(self) -> Iterator[bytes]:
        """Yield the body as it arrives."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield from self._read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield from self._read(int(self.headers.get("Content-Length", 0)))

    def _read(self, size: int) -> Iterator[bytes]:
        while size:
            block = self.rfile.read(min(size, BLOCK))
            if not block:
                raise ConnectionError("the client went away")
            size -= len(block)
            yield block

    def _troubled(self, plan: Plan, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield a body with what is planned to go wrong in it: in the middle of the first block."""
        first = next(pieces, b"")
        if plan.damage:
            first = bytes([first[0] ^ 1]) + first[1:]
        yield first[: len(first) // 2]
        if plan.stall:
            self.hub.wait()
        if plan.cut:
            raise ConnectionError("cut on purpose")
        yield first[len(first) // 2 :]
        yield from pieces

    def _test(self, path: str) -> None:
        """Answer a test that runs in another process."""
        body = b"".join(self._pieces())
        if path == "/_test/plan":
            for endpoint, options in json.loads(body).items():
                self.hub.plan(endpoint, **options)
        elif path == "/_test/release":
            self.hub.release()
        elif path == "/_test/set":
            for name, value in json.loads(body).items():
                assert name in {"quota", "part_size", "page"}, name
                setattr(self.hub, name, value)
        elif path == "/_test/requests":
            rows = zip(self.hub.requests, self.hub.headers, strict=False)
            self._json(200, [[*request, headers] for request, headers in rows])
            return
        with self.hub.lock:
            table = self.hub.state() | {
                "plans": {k: [asdict(p) for p in v] for k, v in self.hub.plans.items()}
            }
        self._json(200, table)


def _unquoted_revision(path: str) -> str:
    """Return a path in which the branch of a pull request is as clients that do not quote it write it."""
    return re.sub(r"/refs%2Fpr%2F(\d+)", r"/refs/pr/\1", path)


def serve(hub: TakingHub, port: int = 0) -> ThreadingHTTPServer:
    """Serve a hub that takes uploads on a port of this machine, a free one for 0; the caller shuts it down."""
    hub.endpoints = frozenset(ENDPOINTS)
    handler = type("Handler", (_TakingHandler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def main() -> None:
    """Serve until the process is killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--serve", action="append", default=[], metavar="ORG/NAME=DIR")
    options = parser.parse_args()
    hub = TakingHub(root=options.root.resolve())
    for each in options.serve:
        name, _, folder = each.partition("=")
        hub.add(name, Path(folder))
    serve(hub, options.port)
    sys.stdout.write(f"{hub.url}\n")
    sys.stdout.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main()
