"""What a hub that takes uploads has: its repos, who may do what, and what is planned to go wrong."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hub.blobs import Blobs
from tests.hub.repos import Written
from tests.hub.server import Hub

WRITE_TOKEN = "hf_" + "writetoken" * 3
READ_TOKEN = "hf_" + "readtokens" * 3
SECONDS_OF_A_STALL = 60


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and whether it can write."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, repo: str) -> bool:
        """Is the repo in a namespace of this account?"""
        return repo.partition("/")[0] in {self.name, *self.orgs}


@dataclass
class Plan:
    """What goes wrong at one endpoint, for how many requests; -1 is all."""

    status: int = 0
    """Answered instead of what was asked for."""
    cut: bool = False
    """The connection ends in the middle of the body."""
    lose: bool = False
    """It is done, and the connection ends before the answer."""
    damage: bool = False
    """The first byte arrives as another."""
    stall: bool = False
    """It waits in the middle of the body, or before it is done where there is none, until ``release``."""
    stall_after: bool = False
    """It waits when it is done, before the answer, until ``release``."""
    times: int = 1
    retry_after: int | None = None
    message: str = ""


@dataclass
class TakingHub(Hub):
    """What the server has, who may do what, and what goes wrong."""

    root: Path = field(default_factory=Path)
    accounts: dict[str, Account] = field(default_factory=dict)
    written: dict[str, Written] = field(default_factory=dict)
    plans: dict[str, list[Plan]] = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)
    quota: int | None = None
    """Bytes of LFS that private repos have room for, all together."""
    part_size: int | None = None
    """Bytes from which on a file goes over LFS in parts, and of each part."""
    page: int = 1000
    """Entries of a page of a tree."""
    endpoints: frozenset[str] = frozenset()
    """What faults can be planned for."""
    lock: Any = field(default_factory=threading.RLock)
    statuses: list[tuple[str, int]] = field(default_factory=list)
    """Endpoint and status of each answer; status 0 is none."""

    def __post_init__(self) -> None:
        self.blobs, self.folder = Blobs(self.root), self.root / "repos"
        self.folder.mkdir(exist_ok=True)
        for path in sorted(self.folder.glob("*.json")):
            repo = Written.load(path)
            self.written[repo.name] = repo
        self.accounts |= {
            WRITE_TOKEN: Account("me", "write", ("org",)),
            READ_TOKEN: Account("me", "read", ("org",)),
        }

    def plan(self, endpoint: str, **options: Any) -> None:
        """Plan a fault of an endpoint (``Plan``); later ones come after it."""
        assert endpoint in self.endpoints, endpoint
        self.released.clear()
        self.stalled.clear()
        self.plans.setdefault(endpoint, []).append(Plan(**options))

    def next_plan(self, endpoint: str) -> Plan:
        """Return what is planned for this request."""
        with self.lock:
            for plan in self.plans.get(endpoint, []):
                if plan.times:
                    plan.times -= 1
                    return plan
        return Plan()

    def release(self) -> None:
        """Let what waits go on."""
        self.released.set()

    def wait(self) -> None:
        """Wait until the hub is released."""
        self.stalled.set()
        self.released.wait(SECONDS_OF_A_STALL)

    def stored(self) -> int:
        """Return the bytes of LFS that private repos hold."""
        files = {sha256 for repo in self.written.values() if repo.private for sha256 in repo.uploaded}
        return sum(self.blobs.path(each).stat().st_size for each in files)

    def asked(self, endpoint: str) -> list[int]:
        """Return the statuses of the answers of an endpoint, in their order."""
        return [status for name, status in self.statuses if name == endpoint]

    def state(self) -> dict[str, Any]:
        """Return what the repos have, and what was asked for."""
        repos = {name: repo.as_state() for name, repo in self.written.items()}
        return {"repos": repos, "answers": self.statuses, "stalled": self.stalled.is_set()}
