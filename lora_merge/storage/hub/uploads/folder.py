"""A directory of this machine → a repo of the Hub: large files first, and everything in one pull request."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from lora_merge.errors import LoraMergeError
from lora_merge.storage.hub.uploads.bars import quiet_bars
from lora_merge.storage.hub.uploads.pull_request import FOLDER, PullRequest
from lora_merge.storage.hub.uploads.remote_repo import RemoteRepo, versions_of
from lora_merge.storage.hub.uploads.replacing import check_free, replaced
from lora_merge.storage.objects.store import Entry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lora_merge.core.report import Observer
    from lora_merge.storage.hub.uploads.push import Push
    from lora_merge.storage.hub.uploads.remote_repo import Branch

_LARGE = (".safetensors", ".bin", ".gguf")
"""Files that go up one by one; all others go with the last commit."""

_BLOCK_BYTES = 1 << 22


def push_folder(
    root: Path, push: Push, marks: Sequence[str], watch: Observer, *, overwrite: bool = False
) -> str:
    """Push all files of a directory; return where they can be seen.

    A run that was interrupted is continued: what the pull request has already is not sent again. Nothing is pushed where the
    branch has the same files.

    Args:
        root: the directory.
        push: where to.
        marks: files by which an earlier output is recognised.
        watch: hears of the phase and its bytes.
        overwrite: an earlier output may be replaced.

    Raises:
        LoraMergeError: the branch is taken, or the Hub refuses something. The directory stays.
    """
    repo, files = RemoteRepo(push, is_begun=True), _files(root)
    with quiet_bars():
        watch.phase(f"pushing to {push.repo}", sum(path.stat().st_size for path in files.values()))
        branch = repo.branch()
        if _has_all(branch, files, marks[-1]):
            return seen_at(repo)
        entries = {name: _entry(path) for name, path in files.items()}
        check_free(push, branch, marks, overwrite=overwrite)
        repo.create()
        merge = _fingerprint(entries)
        left = PullRequest.find(repo, merge)
        base = repo.head(push.branch or None)
        pull = left[0] if left else PullRequest.open(repo, merge, base, push.message)
        try:
            _fill(pull, files, entries, watch, repo)
            removed = [name for name in replaced(branch, files) if not name.startswith(FOLDER)]
            small = {name: path for name, path in files.items() if not name.endswith(_LARGE)}
            pull.complete(small, files.keys() - small.keys(), removed, push.message)
            if push.is_left_open:
                return pull.url
            pull.merge("The output is complete.")
        except (LoraMergeError, KeyboardInterrupt) as exc:
            exc.add_note(
                f"{root} is complete; run again with --resume to push it: {pull.url} has what was sent"
            )
            raise
        return seen_at(repo)


def seen_at(repo: RemoteRepo) -> str:
    """Return the address at which people see a branch of a repo."""
    at = f"/tree/{repo.push.branch}" if repo.push.branch else ""
    return f"{repo.api.endpoint}/{repo.push.repo}{at}"


def _fill(
    pull: PullRequest,
    files: Mapping[str, Path],
    entries: Mapping[str, Entry],
    watch: Observer,
    repo: RemoteRepo,
) -> None:
    """Upload the large files that the pull request does not have.

    Raises:
        WriteError: the Hub refuses something, or a file changes meanwhile.
    """
    there = repo.entries(pull.head)
    for name in sorted(name for name in files if name.endswith(_LARGE)):
        if there.get(name) != entries[name]:
            pull.upload(name, files[name], entries[name])
            pull.add(name)
        watch.advance(entries[name].nbytes)
        watch.done(name)


def _files(root: Path) -> dict[str, Path]:
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}


def _entry(path: Path) -> Entry:
    """Return the size and the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return Entry(path.stat().st_size, digest.hexdigest())


def _has_all(branch: Branch, files: Mapping[str, Path], manifest: str) -> bool:
    """Return True when a branch has these files: all of their sizes, and the manifest, which has the digest of each."""
    sizes = {name: entry.nbytes for name, entry in branch.entries.items()}
    if manifest not in files or any(sizes.get(name) != path.stat().st_size for name, path in files.items()):
        return False
    return branch.entries[manifest].version in versions_of(files[manifest].read_bytes())


def _fingerprint(entries: Mapping[str, Entry]) -> str:
    lines = "".join(f"{name} {entry.nbytes} {entry.version}\n" for name, entry in sorted(entries.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def check_target(push: Push, marks: Sequence[str], card: str, *, overwrite: bool) -> None:
    """Check before anything is made that an output may be pushed: the branch, the token and the model card.

    Raises:
        LoraMergeError: it may not, or the Hub cannot be asked.
    """
    repo = RemoteRepo(push)
    repo.check_may_write()
    check_branch(repo, marks, card, overwrite=overwrite)


def check_branch(repo: RemoteRepo, marks: Sequence[str], card: str, *, overwrite: bool) -> None:
    """Check that the branch is free, or may be replaced, that the repo has the visibility that was asked for, and that the Hub
    takes the model card, if it is known.

    Raises:
        LoraMergeError: one of these is not so, or the Hub cannot be asked.
    """
    branch = repo.branch()
    check_free(repo.push, branch, marks, overwrite=overwrite)
    if branch.head:
        repo.check_visibility(is_private=branch.is_private)
    if card:
        repo.check_card(card)
