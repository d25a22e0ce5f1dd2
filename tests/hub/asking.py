"""A request to the hub that takes uploads, who asks, the answer, and how the Hub words its refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.hub.taking import Account, TakingHub

if TYPE_CHECKING:
    from tests.hub.repos import Commit, Discussion, Written

CONFLICT = "A commit has happened since. Please refresh and try again."
NO_CREDENTIALS = "Invalid credentials in Authorization header"
READ_ONLY = "you must use a write token to upload to a repository"
NOT_YOURS = "pass `create_pr=1` as a query parameter to create a Pull Request"
FULL = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit"
NO_POINTER = (
    "Your push was rejected because an LFS pointer pointed to a file that does not exist. For instance, this can happen if you"
    " used git push --no-verify to push your changes. Offending file: - {}"
)
TOO_MANY = "We had to rate limit you. To continue using our service, please retry later."


@dataclass(frozen=True)
class Answer:
    """What is sent back: JSON, or a file."""

    table: object = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    name: str = ""


class RefusedError(Exception):
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str = "", *, retry_after: int | None = None) -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message, "X-Error-Code": code}
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        self.answer = Answer(
            {"error": message}, status, {key: value for key, value in headers.items() if value}
        )


@dataclass
class Asked:
    """A request for an endpoint of uploads."""

    hub: TakingHub
    who: Account | None
    path: Mapping[str, str]
    """The parts of the path that have names, without quotes."""
    query: Mapping[str, str]
    pieces: Iterator[bytes]
    """The body, as it arrives."""

    def body(self) -> bytes:
        """Return the whole body."""
        return b"".join(self.pieces)

    def json(self) -> dict[str, Any]:
        """Return the table that was sent; an empty one where nothing was."""
        table: dict[str, Any] = json.loads(self.body() or b"{}")
        return table

    def form(self) -> dict[str, list[str]]:
        """Return the fields of a form."""
        return parse_qs(self.body().decode())

    def needs_account(self) -> Account:
        """Return who asks; refuse one without a token."""
        if self.who is None:
            raise RefusedError(401, "Invalid username or password.")
        return self.who

    def repo(self) -> Written:
        """Return the repo that the path names, where the account may see it."""
        repo = self.hub.written.get(self.path["repo"])
        if repo is None or (repo.private and not (self.who and self.who.owns(repo.name))):
            raise RefusedError(404 if self.who else 401, "Repository not found", "RepoNotFound")
        return repo

    def repo_to_write(self, *, is_pull: bool = False) -> Written:
        """Return the repo that the path names, where the token may write into it, or open a pull request."""
        repo, who = self.repo(), self.needs_account()
        if who.role != "write":
            raise RefusedError(403, READ_ONLY)
        if not is_pull and not who.owns(repo.name):
            raise RefusedError(403, NOT_YOURS)
        return repo

    def commit(self, repo: Written) -> Commit:
        """Return the commit that the path names."""
        found = repo.find(self.path.get("revision") or "main")
        if found is None:
            raise RefusedError(404, f"Invalid rev id: {self.path['revision']}", "RevisionNotFound")
        return found

    def discussion(self, repo: Written) -> Discussion:
        """Return the discussion that the path names."""
        number = int(self.path["number"])
        if number > len(repo.discussions):
            raise RefusedError(404, "Discussion not found")
        return repo.discussions[number - 1]

    def save(self, repo: Written) -> None:
        """Keep what was changed."""
        repo.save(self.hub.folder)
