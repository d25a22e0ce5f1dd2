"""A hub on loopback: it speaks the endpoints of Hugging Face and of ModelScope that their packages call.

Repos are directories of real files. Every request is recorded, so that a test can say what was asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT_LENGTH = 40
BLOCK_BYTES = 1 << 20


def commit_of(text: str) -> str:
    """Return what a commit of this content might be called."""
    return hashlib.sha1(text.encode()).hexdigest()


@dataclass
class Repo:
    """One repo: the files of each revision, and who may read them."""

    revisions: dict[str, Path]
    commits: dict[str, str]
    token: str = ""
    gated: bool = False

    def find(self, revision: str) -> tuple[str, Path] | None:
        """Return the commit and the files of a branch, a tag or a commit."""
        for name, root in self.revisions.items():
            if revision in {name, self.commits[name]}:
                return self.commits[name], root
        return None


@dataclass
class Hub:
    """What the server has, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    """File name → how many answers break off in the middle of it."""
    stall: dict[str, threading.Event] = field(default_factory=dict)
    """File name → the event that is waited for in the middle of it."""
    stalled: threading.Event = field(default_factory=threading.Event)
    failing: dict[str, int] = field(default_factory=dict)
    """File name → the status that is answered instead."""
    busy: dict[str, int] = field(default_factory=dict)
    """File name → how many requests for it are answered with status 503 first."""
    rangeless: set[str] = field(default_factory=set)
    """Names of files that are sent whole, whatever range is asked for."""
    short: set[str] = field(default_factory=set)
    """Names of files of whose ranges only the first half is sent, as a whole answer."""
    sent: dict[str, int] = field(default_factory=dict)
    """File name → bytes of it that were sent in answers to requests of ranges."""
    network: str = ""
    """URL of the storage network that requests for weight files are redirected to; empty where there is none."""
    network_headers: list[dict[str, str]] = field(default_factory=list)
    signature: int = 1
    """In the addresses of the network that are valid now."""
    url: str = ""

    def add(self, repo: str, root: Path, *, token: str = "", gated: bool = False, **revisions: Path) -> Repo:
        """Add a repo whose default branch is ``root``; return it."""
        branches = {"main": root, "master": root, **revisions}
        commits = {name: commit_of(f"{repo}{path}") for name, path in branches.items()}
        self.repos[repo] = Repo(branches, commits, token, gated)
        return self.repos[repo]

    def fetched(self) -> list[str]:
        """Return the files whose bytes were asked for, in their repos, sorted; each once."""
        paths = {path for method, path in self.requests if method == "GET"}
        files = {re.sub(r"^/[^/]+/[^/]+/resolve/[^/]+/", "", path) for path in paths if "/resolve/" in path}
        files |= {path.partition("FilePath=")[2] for path in paths if "FilePath=" in path}
        return sorted(files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _from_network(self) -> None:
        """Answer as the storage network: a signed address is valid for a time, and says which file."""
        self.hub.network_headers.append({key.title(): value for key, value in self.headers.items()})
        name, signature = (
            unquote(urlsplit(self.path).path).removeprefix("/network/"),
            urlsplit(self.path).query,
        )
        if signature != f"signature={self.hub.signature}":
            self._json(403, {"error": "the signature has expired"})
            return
        repo, commit, file = name.split("@")
        found = self.hub.repos[repo].find(commit)
        assert found is not None
        self._bytes(found[1] / file, {})

    def _answer(self) -> None:
        if self.path.startswith("/network/"):
            self._from_network()
            return
        self.hub.requests.append((self.command, unquote(self.path)))
        self.hub.headers.append({key.title(): value for key, value in self.headers.items()})
        self._route()

    def _route(self) -> None:
        """Answer what reads a repo of files."""
        address = urlsplit(self.path)
        path = unquote(address.path)
        if match := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
            if tree := re.fullmatch(r"(.+?)/tree/(.+)", match[1]):
                self._tree(tree[1], tree[2])
            else:
                self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/.+)?", path):
            query = {key: values[0] for key, values in parse_qs(address.query).items()}
            self._modelscope(match[1], match[2] or "", query)
        else:
            self._json(404, {"error": "no such endpoint"})

    def _open(self, name: str, revision: str, *, listing: bool) -> tuple[Repo, str, Path] | None:
        """Return a repo at a revision, or answer why not."""
        repo = self.hub.repos.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = {repo.token for repo in self.hub.repos.values()} - {""}
        if given and known and given not in known:
            message = {"X-Error-Message": "Invalid credentials in Authorization header"}
            self._json(401, {"error": "Invalid credentials in Authorization header"}, message)
        elif repo is None or (repo.token and given != repo.token and not repo.gated):
            self._json(
                401 if not given else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        elif repo.gated and not listing and given != repo.token:
            self._json(403 if given else 401, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif (found := repo.find(revision)) is None:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo, *found
        return None

    def _info(self, name: str, revision: str) -> None:
        if found := self._open(name, revision, listing=True):
            repo, commit, root = found
            siblings = [
                {"rfilename": file, "size": path.stat().st_size} for file, path in _files(root).items()
            ]
            table = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
            self._json(200, table | {"private": bool(repo.token), "tags": [], "downloads": 0, "likes": 0})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._open(name, revision, listing=True):
            entries = [
                {"type": "file", "path": file, "size": path.stat().st_size, "oid": _etag(path)}
                for file, path in _files(found[2]).items()
            ]
            self._json(200, entries)

    def _file(self, name: str, revision: str, file: str) -> None:
        if (found := self._open(name, revision, listing=False)) is None:
            return
        _, commit, root = found
        path = root / file
        if not path.is_file():
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        stated = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": commit}
        if self.hub.network and path.suffix == ".safetensors":
            address = f"{self.hub.network}/network/{name}@{commit}@{file}?signature={self.hub.signature}"
            linked = {"X-Linked-ETag": stated["ETag"], "X-Linked-Size": str(path.stat().st_size)}
            self._json(302, {}, stated | linked | {"Location": address})
            return
        self._bytes(path, stated)

    def _modelscope(self, name: str, rest: str, query: dict[str, str]) -> None:
        repo = self.hub.repos.get(name)
        found = repo.find(query.get("Revision", "master")) if repo else None
        if found is None:
            self._json(404, {"Code": 10010205001, "Message": "not found", "Success": False})
        elif rest == "/repo/files":
            entries = [
                {
                    "Path": file,
                    "Name": path.name,
                    "Type": "blob",
                    "Size": path.stat().st_size,
                    "Sha256": _sha256(path),
                }
                for file, path in _files(found[1]).items()
            ]
            self._json(200, {"Code": 200, "Success": True, "Data": {"Files": entries}})
        elif rest == "/repo":
            self._bytes(found[1] / query["FilePath"], {})
        else:
            self._json(200, {"Code": 200, "Success": True, "Data": {"Name": name, "Path": name}})

    def _bytes(self, path: Path, headers: dict[str, str], name: str = "") -> None:
        """Send a file, or a range of it; ``name`` is the one that faults are planned for, where it is another."""
        name, size = name or path.name, path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if name in self.hub.rangeless:
            wanted = None
        start = int(wanted[1]) if wanted else 0
        if self._is_refused(name) or (wanted and self._is_beyond(start, size)):
            return
        stop = min(int(wanted[2]) + 1, size) if wanted and wanted[2] else size
        if wanted and name in self.hub.short:
            stop = start + (stop - start) // 2
        self.send_response(206 if wanted else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(stop - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        if self.command != "HEAD":
            if wanted:
                self.hub.sent[name] = self.hub.sent.get(name, 0) + stop - start
            with path.open("rb") as file:
                file.seek(start)
                self._body(name, file, stop - start)

    def _is_refused(self, name: str) -> bool:
        """Answer with an error where the test wants that."""
        if self.command == "HEAD":
            return False
        if status := self.hub.failing.get(name):
            self._json(status, {"error": "on purpose"})
        elif self.hub.busy.get(name, 0) > 0:
            self.hub.busy[name] -= 1
            self._json(503, {"error": "busy"})
        else:
            return False
        return True

    def _is_beyond(self, start: int, size: int) -> bool:
        """Answer with an error where a range begins behind the end."""
        if start >= size:
            self._json(416, {"error": "range"}, {"Content-Range": f"bytes */{size}"})
        return start >= size

    def _body(self, name: str, file: BinaryIO, size: int) -> None:
        """Send the next bytes of a file; stop in the middle where the test wants that."""
        self._copy(file, size // 2)
        if self.hub.cut.get(name, 0) > 0:
            self.hub.cut[name] -= 1
            self.close_connection = True
            return
        if name in self.hub.stall:
            self.wfile.flush()
            self.hub.stalled.set()
            self.hub.stall[name].wait(60)
        self._copy(file, size - size // 2)

    def _copy(self, file: BinaryIO, size: int) -> None:
        """Send the next bytes of a file, a block at a time."""
        while size and (block := file.read(min(size, BLOCK_BYTES))):
            self.wfile.write(block)
            size -= len(block)

    def _json(self, status: int, table: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(table).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def start(hub: Hub, *, is_network: bool = False) -> ThreadingHTTPServer:
    """Serve a hub, or its storage network, on a free port of this machine; the caller shuts it down."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    url = f"http://127.0.0.1:{server.server_address[1]}"
    if is_network:
        hub.network = url
    else:
        hub.url = url
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def _files(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
