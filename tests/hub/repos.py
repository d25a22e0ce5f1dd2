"""Repos of a hub that takes uploads: commits that never change, the branches that name them, and discussions; kept as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

COMMIT_LENGTH = 40
SHORTEST = 7
"""Letters of a commit's name that are enough."""


@dataclass(frozen=True)
class Entry:
    """A file of a commit."""

    sha256: str
    size: int
    oid: str
    """What git calls it: of LFS's pointer where the file is in LFS."""
    lfs: bool = False
    xet: str = ""


@dataclass(frozen=True)
class Commit:
    """All files of a repo at one time, and how they came to be so."""

    oid: str
    parent: str
    files: Mapping[str, Entry]
    title: str
    message: str
    operations: int
    author: str
    date: str


@dataclass
class Discussion:
    """A discussion; or a pull request, which has a branch of its own, ``refs/pr/NUMBER``."""

    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str
    created: str
    target: str = "main"
    base: str = ""
    """The commit that a pull request began at."""
    merged: str = ""
    """The commit that it became."""
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ref(self) -> str:
        """The branch of a pull request."""
        return f"refs/pr/{self.num}"

    def tell(self, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        """Add an event; return it."""
        event = {"id": f"{self.num}-{len(self.events)}", "type": kind, "createdAt": now(), "data": data}
        self.events.append(event | {"author": {"name": author}})
        return self.events[-1]

    def comment(self, author: str, text: str) -> dict[str, Any]:
        """Add a comment; return its event."""
        return self.tell("comment", author, {"edited": False, "hidden": False, "latest": {"raw": text}})

    def turn(self, author: str, status: str) -> dict[str, Any]:
        """Change the status; return the event."""
        self.status = status
        return self.tell("status-change", author, {"status": status})


@dataclass
class Written:
    """A repo that can be written."""

    name: str
    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    uploaded: set[str] = field(default_factory=set)
    """SHA-256 of the files whose upload into this repo was finished, whether a commit names them or not."""

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch, of a pull request, or of a commit's name or its beginning."""
        if revision in self.refs:
            return self.commits[self.refs[revision]]
        found = [oid for oid in self.commits if oid.startswith(revision)] if len(revision) >= SHORTEST else []
        return self.commits[found[0]] if len(found) == 1 else None

    def commit(
        self, ref: str, files: Mapping[str, Entry], title: str, message: str, operations: int, author: str
    ) -> Commit:
        """Add a commit to a branch; return it."""
        parent, date = self.refs.get(ref, ""), now()
        text = json.dumps(
            [parent, {name: entry.oid for name, entry in files.items()}, title, date, len(self.commits)]
        )
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, dict(files), title, message, operations, author, date)
        self.refs[ref] = oid
        return self.commits[oid]

    def discuss(
        self, title: str, author: str, status: str, *, base: str = "", target: str = "main"
    ) -> Discussion:
        """Open a discussion; with a base, a pull request that begins there."""
        new = Discussion(len(self.discussions) + 1, title, author, bool(base), status, now(), target, base)
        self.discussions.append(new)
        if base:
            self.refs[new.ref] = base
        return new

    def changed(self, since: str, head: str) -> dict[str, Entry | None]:
        """Return the files that differ between two commits, as they are in the second; None for one that is not there."""
        old, new = self.commits[since].files, self.commits[head].files
        return {name: new.get(name) for name in {*old, *new} if old.get(name) != new.get(name)}

    def conflicts(self, pull: Discussion) -> list[str]:
        """Return the files that a pull request and its target have changed in different ways."""
        mine = self.changed(pull.base, self.refs[pull.ref])
        theirs = self.changed(pull.base, self.refs[pull.target])
        return sorted(name for name in mine.keys() & theirs.keys() if mine[name] != theirs[name])

    def merge(self, pull: Discussion, author: str) -> Commit:
        """Make one commit on the target of what a pull request changed; return it."""
        changes = self.changed(pull.base, self.refs[pull.ref])
        files = {**self.commits[self.refs[pull.target]].files, **changes}
        kept = {name: entry for name, entry in files.items() if entry is not None}
        commit = self.commit(pull.target, kept, f"{pull.title} (#{pull.num})", "", len(changes), author)
        pull.merged = commit.oid
        pull.turn(author, "merged")
        return commit

    def as_state(self) -> dict[str, Any]:
        """Return what a test asks about: branches and their files, pull requests, and commits in their order."""
        return {
            "private": self.private,
            "refs": {
                ref: {name: entry.sha256 for name, entry in sorted(self.commits[oid].files.items())}
                for ref, oid in self.refs.items()
            },
            "heads": self.refs,
            "pull_requests": {
                each.num: {
                    "title": each.title,
                    "status": each.status,
                    "target": each.target,
                    "merged": each.merged,
                }
                for each in self.discussions
                if each.is_pull_request
            },
            "commits": [
                {"oid": each.oid, "parent": each.parent, "title": each.title, "operations": each.operations}
                for each in self.commits.values()
            ],
            "uploaded": sorted(self.uploaded),
        }

    def save(self, folder: Path) -> None:
        """Write the repo into a directory, whole or not at all."""
        path = self.file(folder, self.name)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(asdict(self) | {"uploaded": sorted(self.uploaded)}), encoding="utf-8")
        half.replace(path)

    @staticmethod
    def file(folder: Path, name: str) -> Path:
        """Return where a repo of this name is kept."""
        return folder / f"{name.replace('/', '--')}.json"

    @classmethod
    def load(cls, path: Path) -> Written:
        """Read a repo again."""
        table = json.loads(path.read_text(encoding="utf-8"))
        table["uploaded"] = set(table["uploaded"])
        table["discussions"] = [Discussion(**each) for each in table["discussions"]]
        for oid, each in table["commits"].items():
            files = {name: Entry(**entry) for name, entry in each["files"].items()}
            table["commits"][oid] = Commit(**(each | {"files": files}))
        return cls(**table)


def now() -> str:
    """Return the time as the Hub writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
