"""A repo of the Hub that is written to: what it has, who may write, and its pull requests."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from lora_merge.errors import RequestError, WriteError
from lora_merge.runtime.temporary import temporary_folder
from lora_merge.storage.hub.uploads.failures import repeated, sending
from lora_merge.storage.objects.store import Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from lora_merge.storage.hub.uploads.push import Push

T = TypeVar("T")

MARK = "Merge: "
"""Before the fingerprint, in the description of a pull request."""


@dataclass(frozen=True, slots=True)
class Branch:
    """What a branch has at one commit."""

    head: str = ""
    """The commit; empty where the repo, or the branch, does not exist."""

    is_private: bool = False
    modified: float = 0.0
    """When, in seconds since 1970."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    """Path → size and version: the SHA-256 of a large file, Git's hash of a small one."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A pull request that is open."""

    number: int
    description: str


def versions_of(content: bytes) -> frozenset[str]:
    """Return the versions that the Hub may state for a file: Git's hash of a small one, the SHA-256 of a large one."""
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False)
    return frozenset({blob.hexdigest(), hashlib.sha256(content).hexdigest()})


class RemoteRepo:
    """A repo of the Hub, as a run that pushes to it sees it.

    Args:
        push: which one, and how.
        is_begun: weights are made or uploaded already, so that it is worth to wait for a Hub that does not answer.
    """

    def __init__(self, push: Push, *, is_begun: bool = False) -> None:
        self.push, self.is_begun = push, is_begun

    @cached_property
    def api(self) -> Any:
        """The package's client, with the token of the run."""
        import huggingface_hub

        return huggingface_hub.HfApi(token=self.push.token, library_name="lora-merge")

    def _repeated(self, ask: Callable[[], T]) -> T:
        return repeated(ask, is_begun=self.is_begun)

    @property
    def exists(self) -> bool:
        """Whether there is such a repo, on any branch.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        return self._info(None) is not None

    def _info(self, revision: str | None) -> Any:
        """Return what the Hub says of a revision; None where it has no such repo or revision."""
        from huggingface_hub import errors

        def ask() -> Any:
            with (
                sending(self.push),
                contextlib.suppress(errors.RepositoryNotFoundError, errors.RevisionNotFoundError),
            ):
                return self.api.model_info(self.push.repo, revision=revision)
            return None

        return self._repeated(ask)

    def branch(self) -> Branch:
        """Return the branch that the output goes to; an empty one where it does not exist.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        info = self._info(self.push.branch or None)
        if info is None:
            return Branch()
        modified = info.last_modified.timestamp() if info.last_modified else 0.0
        return Branch(str(info.sha), bool(info.private), modified, self.entries(str(info.sha)))

    def head(self, revision: str | None) -> str:
        """Return the commit that a revision means now; empty where there is none.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        info = self._info(revision)
        return "" if info is None else str(info.sha)

    def entries(self, revision: str) -> dict[str, Entry]:
        """Return all files of a revision.

        Raises:
            WriteError: the Hub cannot be asked.
        """

        def ask() -> dict[str, Entry]:
            with sending(self.push):
                tree = self.api.list_repo_tree(self.push.repo, revision=revision, recursive=True)
                return {
                    one.path: Entry(one.size, one.lfs.sha256 if one.lfs else one.blob_id)
                    for one in tree
                    if hasattr(one, "size")
                }

        return self._repeated(ask)

    def small_files(self, revision: str, names: Collection[str]) -> dict[str, bytes]:
        """Return the content of small files.

        Raises:
            WriteError: they cannot be read.
        """
        import glob

        from huggingface_hub import snapshot_download

        if not names:
            return {}

        def ask() -> dict[str, bytes]:
            with temporary_folder() as folder, sending(self.push):
                snapshot_download(
                    self.push.repo,
                    revision=revision,
                    allow_patterns=[glob.escape(name) for name in names],
                    local_dir=folder,
                    token=self.push.token,
                    library_name="lora-merge",
                )
                return {name: (folder / name).read_bytes() for name in names}

        return self._repeated(ask)

    def check_may_write(self) -> None:
        """Check that the token may write to the repo, or may create it.

        Raises:
            WriteError: it may not, or the Hub cannot be asked.
        """
        push = self.push

        def ask() -> Mapping[str, Any]:
            with sending(push):
                found: Mapping[str, Any] = self.api.whoami()
                return found

        me = self._repeated(ask)
        role = me.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            hint = "make a token with the role “write” at https://huggingface.co/settings/tokens"
            raise WriteError(f"{push}: the token can only read", hint=hint)
        if self.exists:
            if not push.is_left_open:
                self._repeated(self._ask_for_write)
            return
        owner = push.repo.partition("/")[0]
        owners = [str(me.get("name")), *(str(org.get("name")) for org in me.get("orgs", ()))]
        if me.get("name") and owner not in owners:
            sentence = f"{push}: does not exist, and {owner} is not among your names ({', '.join(owners)})"
            raise WriteError(
                sentence, hint=f"write {owners[0]}/{push.repo.partition('/')[2]}, or check the spelling"
            )

    def _ask_for_write(self) -> None:
        with sending(self.push):
            self.api.auth_check(self.push.repo, write=True)

    def check_card(self, text: str) -> None:
        """Have the Hub check the front matter of a model card: its licence, its tags.

        Raises:
            RequestError: the Hub would not take it.
            WriteError: the Hub cannot be asked.
        """
        from huggingface_hub import errors
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def ask() -> str:
            with sending(self.push):
                answer = get_session().post(
                    f"{self.api.endpoint}/api/validate-yaml",
                    json={"content": text, "repoType": "model"},
                    headers=build_hf_headers(token=self.push.token, library_name="lora-merge"),
                )
                try:
                    hf_raise_for_status(answer)
                except errors.BadRequestError:
                    found = answer.json().get("errors", [])
                    return (
                        "; ".join(" ".join(str(one.get("message")).split()) for one in found)
                        or "no reason given"
                    )
                return ""

        said = self._repeated(ask)
        if said:
            sentence = f"is {self.push.repo}, and the Hub refuses the model card of this output: {said}"
            hint = "correct the front matter of the base's or the adapter's README.md, and run again"
            raise RequestError("", 0, "push_to_hub", sentence, hint=hint)

    def create(self) -> None:
        """Create the repo and the branch, where they do not exist.

        Raises:
            WriteError: the Hub refuses it, or the repo has another visibility than was asked for.
        """
        push = self.push

        def ask() -> None:
            with sending(push):
                is_private = push.is_private is not False
                self.api.create_repo(push.repo, private=is_private, exist_ok=True)
                if push.branch:
                    self.api.create_branch(push.repo, branch=push.branch, exist_ok=True)

        info = self._info(None)
        if info is not None:
            self.check_visibility(is_private=bool(info.private))
        self._repeated(ask)

    def check_visibility(self, *, is_private: bool) -> None:
        """Check that a repo that exists is as private as was asked for.

        Raises:
            WriteError: it is not.
        """
        if self.push.is_private in {None, is_private}:
            return
        now, wanted = ("private", "public") if is_private else ("public", "private")
        hint = f"change it at https://huggingface.co/{self.push.repo}/settings, or leave out --{wanted}"
        raise WriteError(f"{self.push}: exists and is {now}, but --{wanted} was given", hint=hint)

    def open_requests(self) -> list[Opened]:
        """Return the pull requests of this user to the branch that lora-merge has opened; the newest first.

        Raises:
            WriteError: the Hub cannot be asked.
        """

        def ask() -> list[Opened]:
            with sending(self.push):
                me = self.api.whoami()["name"]
                return sorted(self._of(me), key=lambda one: -one.number)

        return self._repeated(ask)

    def _of(self, author: str) -> Iterator[Opened]:
        found = self.api.get_repo_discussions(
            self.push.repo, author=author, discussion_type="pull_request", discussion_status="open"
        )
        for one in list(found):
            details = self.api.get_discussion_details(self.push.repo, one.num)
            text = next((event.content for event in details.events if hasattr(event, "content")), "")
            if MARK in text and details.target_branch in {None, self.target, f"refs/heads/{self.target}"}:
                yield Opened(one.num, text)

    @property
    def target(self) -> str:
        """The name of the branch."""
        return self.push.branch or "main"

    def is_there(self, revision: str, wanted: Mapping[str, Entry]) -> bool:
        """Return True when a revision has some files with these sizes and versions.

        Raises:
            WriteError: the Hub cannot be asked.
        """
        entries = self.entries(revision)
        return all(entries.get(name) == entry for name, entry in wanted.items())
