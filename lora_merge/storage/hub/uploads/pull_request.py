"""The pull request that an output is filled in: weights in commits of several files, small files in the last one.

Each commit of weights also has their evidence, in a folder that the last commit removes. Git keeps it in the history of the
pull request, so that a run that is killed before the merge finds it.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from typing import TYPE_CHECKING, Any

from lora_merge.errors import WriteError
from lora_merge.storage.evidence import Finished, evidence_of
from lora_merge.storage.hub.uploads.failures import ConflictError, UnansweredError, repeated, sending
from lora_merge.storage.hub.uploads.remote_repo import MARK, versions_of
from lora_merge.storage.hub.uploads.replacing import KEPT
from lora_merge.storage.objects.store import Entry
from lora_merge.words import counted, listing

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from lora_merge.storage.hub.uploads.remote_repo import Opened, RemoteRepo

FOLDER = ".lora-merge/"
RUN, FILES = f"{FOLDER}run.json", f"{FOLDER}files/"
"""Names in the pull request while it is filled: what the run began with, and the folder of evidence."""

COMMIT_FILES, COMMIT_SECONDS = 20, 60.0
"""A commit has at most so many weight files, and comes at most so often: the Hub advises fewer than 100 files, and limits the
number of commits in an hour."""


class PullRequest:
    """A pull request that is open. Several threads may upload to it at once.

    Args:
        repo: where it is.
        number: its number.
        head: its last commit.
        base: the commit of the branch that it is to be merged into.
    """

    def __init__(self, repo: RemoteRepo, number: int, head: str, base: str) -> None:
        self._repo, self.number, self.head, self._base = repo, number, head, base
        self._lock = threading.Lock()
        self._uploaded: dict[str, Any] = {}
        """Name → the operation of a file that is uploaded and not committed."""

        self._waiting: dict[str, bytes] = {}
        """Name → evidence, of those that the next commit has."""

        self._last = 0.0
        self.sent: dict[str, Entry] = {}
        """Weight files that this process has committed."""

    @classmethod
    def open(cls, repo: RemoteRepo, merge: str, base: str, message: str) -> PullRequest:
        """Open a pull request to the branch.

        Args:
            repo: where.
            merge: the fingerprint of the run.
            base: the commit that the branch has now.
            message: its title.

        Raises:
            WriteError: the Hub refuses it.
        """
        from huggingface_hub import CommitOperationAdd

        run = json.dumps({"merge": merge, "base": base}).encode()
        about = (
            "lora-merge is filling this pull request. It is merged when the output is complete and verified.\n\n"
            f"{MARK}`{merge}`"
        )

        def ask() -> PullRequest:
            with sending(repo.push):
                info = repo.api.create_commit(
                    repo.push.repo,
                    [CommitOperationAdd(RUN, run)],
                    commit_message=message,
                    commit_description=about,
                    revision=repo.target,
                    create_pr=True,
                )
            return cls(repo, int(info.pr_num), str(info.oid), base)

        def carefully() -> PullRequest:
            try:
                return ask()
            except UnansweredError:
                # It may be open, and the answer lost.
                found = cls.find(repo, merge)
                if found is None:
                    raise
                return found[0]

        return repeated(carefully)

    @classmethod
    def find(cls, repo: RemoteRepo, merge: str) -> tuple[PullRequest, tuple[Finished, ...]] | None:
        """Return the pull request that an interrupted run of a merge has left, and the files that it has finished.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        every = (cls.found(repo, one, merge) for one in repo.open_requests())
        return next((one for one in every if one is not None), None)

    @classmethod
    def found(
        cls, repo: RemoteRepo, opened: Opened, merge: str
    ) -> tuple[PullRequest, tuple[Finished, ...]] | None:
        """Return a pull request that an interrupted run of a merge has left, and the files that it has finished.

        Returns:
            None where the pull request is of another merge, or was changed by somebody else.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        if f"{MARK}`{merge}`" not in opened.description:
            return None
        head = repo.head(f"refs/pr/{opened.number}")
        entries = repo.entries(head)
        at = head
        if RUN not in entries:
            at = _before(repo, opened.number)
            if RUN not in repo.entries(at):
                return None
        content = repo.small_files(at, [RUN])
        with contextlib.suppress(ValueError, KeyError, TypeError):
            run = json.loads(content[RUN])
            if run["merge"] == merge:
                finished = tuple(one for one in cls.evidence(repo, at, merge) if one.is_there(entries))
                return cls(repo, opened.number, head, str(run["base"])), finished
        return None

    @staticmethod
    def evidence(repo: RemoteRepo, revision: str, merge: str) -> list[Finished]:
        """Return the evidence of a merge that a revision has.

        Raises:
            WriteError: it cannot be read.
        """
        names = [name for name in repo.entries(revision) if name.startswith(FILES)]
        read = [_evidence(name, text, merge) for name, text in repo.small_files(revision, names).items()]
        return [one for one in read if one is not None]

    @property
    def reference(self) -> str:
        """The name of its branch."""
        return f"refs/pr/{self.number}"

    @property
    def url(self) -> str:
        """Where people see it."""
        return f"{self._repo.api.endpoint}/{self._repo.push.repo}/discussions/{self.number}"

    def upload(self, name: str, path: Path, wanted: Entry) -> None:
        """Upload a file of this disk. A commit has it later.

        Args:
            name: in the repo.
            path: of the file.
            wanted: its size and the SHA-256 of its bytes, as they were when they were written.

        Raises:
            WriteError: the Hub refuses it, or does not answer, or other bytes were sent.
        """
        from huggingface_hub import CommitOperationAdd

        def ask() -> Entry:
            with sending(self._repo.push, name):
                operation = CommitOperationAdd(name, path)
                self._repo.api.preupload_lfs_files(
                    self._repo.push.repo, [operation], revision=self.reference, num_threads=1
                )
                return self.keep(name, operation)

        sent = repeated(ask)
        if sent != wanted:
            sentence = f"{name}: other bytes were sent than were written (SHA-256 {sent.version}, not {wanted.version})"
            raise WriteError(
                sentence, hint="run again with --resume; if it happens again, the disk may be faulty"
            )

    def keep(self, name: str, operation: Any) -> Entry:
        """Keep the operation of a file that is uploaded, until it is committed; return its size and SHA-256."""
        with self._lock:
            self._uploaded[name] = operation
        return Entry(operation.upload_info.size, operation.upload_info.sha256.hex())

    def add(self, name: str, evidence: bytes = b"") -> None:
        """Have a file that is uploaded in the next commit, with its evidence. Commits come when enough has come together.

        Raises:
            WriteError: the Hub refuses the commit.
        """
        with self._lock:
            self._waiting[name] = evidence
            if len(self._waiting) >= COMMIT_FILES or time.monotonic() - self._last >= COMMIT_SECONDS:
                self._send()

    def send(self, *, is_last_try: bool = False) -> None:
        """Commit what is uploaded and not yet committed.

        Args:
            is_last_try: ask once only, since the run is about to end.

        Raises:
            WriteError: the Hub refuses it.
        """
        with self._lock:
            self._send(is_last_try=is_last_try)

    def _send(self, *, is_last_try: bool = False) -> None:
        from huggingface_hub import CommitOperationAdd

        if not self._waiting:
            return
        names = sorted(self._waiting)
        operations = [self._uploaded[name] for name in names]
        wanted = {
            one.path_in_repo: Entry(one.upload_info.size, one.upload_info.sha256.hex()) for one in operations
        }
        beside = [
            CommitOperationAdd(f"{FILES}{name}.json", self._waiting[name])
            for name in names
            if self._waiting[name]
        ]
        message = f"Weights: {counted(len(names), 'file')}"
        self._commit([*operations, *beside], message, wanted, is_last_try=is_last_try)
        self.sent |= wanted
        for name in names:
            del self._waiting[name], self._uploaded[name]
        self._last = time.monotonic()

    def _commit(
        self,
        operations: list[Any],
        message: str,
        wanted: Mapping[str, Entry],
        *,
        is_last_try: bool = False,
    ) -> None:
        """Commit on top of the last commit that this run knows.

        Raises:
            WriteError: the Hub refuses it, or something else has committed there.
        """

        def ask() -> str:
            with sending(self._repo.push):
                info = self._repo.api.create_commit(
                    self._repo.push.repo,
                    operations,
                    commit_message=message,
                    revision=self.reference,
                    parent_commit=self.head,
                )
                return str(info.oid)

        def carefully() -> str:
            try:
                return ask()
            except (UnansweredError, ConflictError):
                # The commit may have been made, and its answer lost.
                head = self._repo.head(self.reference)
                if head != self.head and self._repo.is_there(head, wanted):
                    return head
                raise

        self.head = ask() if is_last_try else repeated(carefully)

    def complete(
        self, small: Mapping[str, Path], large: Collection[str], removed: Collection[str], message: str
    ) -> None:
        """Commit the small files, and remove old ones and the evidence. What is not yet committed comes before.

        Args:
            small: name → a file of this disk.
            large: names of the files that are there already.
            removed: files of the branch that the output does not have.
            message: of the commit.

        Raises:
            WriteError: the Hub refuses it.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        self.send()
        entries = self._repo.entries(self.head)
        gone = [name for name in removed if name in entries]
        operations: list[Any] = [CommitOperationAdd(name, path) for name, path in small.items()]
        operations += [CommitOperationDelete(name) for name in gone]
        if any(name.startswith(FOLDER) for name in entries):
            operations.append(CommitOperationDelete(FOLDER, is_folder=True))
        with self._lock:
            self._commit(operations, message, {})
        after = self._repo.entries(self.head)
        wrong = {name for name in large if after.get(name) != entries.get(name)}
        wrong |= {name for name, path in small.items() if not _is_there(after, name, path)}
        wrong |= after.keys() - {*small, *large, KEPT}
        if wrong:
            sentence = f"{self.url}: has other files than this run has written ({listing(sorted(wrong), 3)})"
            hint = "something else writes there too: close the pull request, and run again"
            raise ConflictError(sentence, hint=hint)

    def merge(self, comment: str) -> None:
        """Merge it into its branch, which then has the whole output at once.

        Raises:
            WriteError: the branch has changed since the run began, or the Hub refuses it.
        """
        push, now = self._repo.push, self._repo.head(self._repo.push.branch or None)
        if now != self._base:
            sentence = f"{push}: has changed since this run began, so the output was not merged into it"
            hint = f"look at {self.url}: the output is complete there; merge it, or close it and run again"
            raise ConflictError(sentence, hint=hint)

        if self._repo.head(self.reference) != self.head:
            sentence = f"{self.url}: something else has committed there, so it was not merged"
            raise ConflictError(sentence, hint="close it, and run again")

        def ask() -> None:
            try:
                with sending(push):
                    self._repo.api.merge_pull_request(push.repo, self.number, comment=comment)
            except WriteError:
                # It may be merged, and the answer lost.
                if self._status() != "merged":
                    raise

        repeated(ask)
        wanted, found = self._repo.entries(self.head), self._repo.entries(self._repo.target)
        if wanted != found:
            odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            sentence = f"{push}: something else has written there at the same moment ({listing(odd, 3)})"
            raise ConflictError(sentence, hint=f"look at it; {self.url} has the output alone")

    def _status(self) -> str:
        with sending(self._repo.push):
            return str(self._repo.api.get_discussion_details(self._repo.push.repo, self.number).status)

    def close(self, comment: str) -> None:
        """Close it; it stays to be seen.

        Raises:
            WriteError: the Hub refuses it.
        """
        with sending(self._repo.push):
            self._repo.api.change_discussion_status(
                self._repo.push.repo, self.number, new_status="closed", comment=comment
            )


def _is_there(entries: Mapping[str, Entry], name: str, path: Path) -> bool:
    """Return True when some files have the bytes of a file of this disk under a name."""
    return name in entries and entries[name].version in versions_of(path.read_bytes())


def _before(repo: RemoteRepo, number: int) -> str:
    """Return the last commit but one of a pull request: the last one has removed the evidence."""
    with sending(repo.push):
        commits = repo.api.list_repo_commits(repo.push.repo, revision=f"refs/pr/{number}")
        return str(commits[min(1, len(commits) - 1)].commit_id)


def _evidence(name: str, content: bytes, merge: str) -> Finished | None:
    return evidence_of(name.removeprefix(FILES).removesuffix(".json"), content, merge)
