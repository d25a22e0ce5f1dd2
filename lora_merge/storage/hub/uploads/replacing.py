"""May an output have a branch of a repo: what is there now, and is an input from there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import WriteError
from lora_merge.words import choice, listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lora_merge.storage.destination import Wish
    from lora_merge.storage.hub.uploads.push import Push
    from lora_merge.storage.hub.uploads.remote_repo import Branch

_OF_EMPTY = frozenset({".gitattributes", "README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"})
"""Files that the Hub's own page makes in a new repo."""

KEPT = ".gitattributes"
"""It says which files Git stores elsewhere. Each repo has it."""


def check_free(push: Push, branch: Branch, marks: Sequence[str], *, overwrite: bool) -> None:
    """Check that an output may have a branch.

    Args:
        push: which one.
        branch: what it has.
        marks: files by which an output of this kind is recognised.
        overwrite: an old output may be replaced.

    Raises:
        WriteError: it may not.
    """
    files = branch.entries.keys() - _OF_EMPTY
    if not files:
        return
    is_old = any(mark in files for mark in marks)
    if not is_old:
        sentence = f"{push}: has files ({listing(sorted(files), 3)}) and is not an earlier output (it has no {choice(marks)})"
        raise WriteError(sentence, hint="choose another repo, or another branch with --revision")
    # A pull request replaces nothing by itself.
    if not (overwrite or push.is_left_open):
        hint = (
            "choose another repo, or pass --overwrite: one commit then replaces it, and the history keeps it"
        )
        raise WriteError(f"{push}: already exists", hint=hint)


def check_apart(wish: Wish, push: Push) -> None:
    """Check that no weights of an input are read from the repo of the output.

    Raises:
        WriteError: some are.
    """
    if any(text.startswith(f"hf://{push.repo}@") for text in wish.stored_inputs):
        sentence = f"{push}: is the repo that the base is read from, with --stream-base"
        raise WriteError(sentence, hint="choose another repo, or leave out --stream-base")


def replaced(branch: Branch, written: Iterable[str]) -> list[str]:
    """Return the files of a branch that an output removes: all but its own."""
    return sorted(branch.entries.keys() - {*written, KEPT})


def is_whole(branch: Branch, manifest: str) -> bool:
    """Return True when a branch has a complete output: configuration and manifest."""
    return CONFIG_FILE in branch.entries and manifest in branch.entries
