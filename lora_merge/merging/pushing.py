"""Outputs that go to the Hub: what a request says of it, and what a push to it may use of this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lora_merge.errors import RequestError
from lora_merge.formats.model_card import card_text
from lora_merge.merging.hf_checkpoint import MARKS
from lora_merge.merging.made_from import provenance_of
from lora_merge.requests.request import Request
from lora_merge.requests.sizes import parse_size
from lora_merge.requests.values import MOST_MESSAGE
from lora_merge.storage.hub.uploads.folder import check_target, push_folder
from lora_merge.storage.hub.uploads.push import Push, is_on_hub, parse_target
from lora_merge.storage.objects.urls import is_store_url
from lora_merge.words import listing, size_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lora_merge.core.report import Observer
    from lora_merge.planning.run import Planned
    from lora_merge.requests.request import ConvertRequest, ExtractRequest

Pushing = TypeVar("Pushing", "Request", "ConvertRequest", "ExtractRequest")

SPOOL_BYTES = 20_000_000_000
"""Of weight files that wait on this disk, unless more are asked for, or one file is larger."""

_ONLY_HUB = {
    "revision": "--revision",
    "visibility": "--private or --public",
    "create_pr": "--create-pr",
    "commit_message": "--commit-message",
    "spool_limit": "--spool-limit",
}
"""Options that say something about a push → how they are written."""


def placed(request: Pushing) -> Pushing:
    """Return a request whose output is on the Hub where it has no other place.

    Raises:
        RequestError: it names two repos, or says something of a push and has none.
    """
    if request.push_to_hub and is_on_hub(request.out):
        hint = "leave out one of the two"
        raise RequestError("", 0, "push_to_hub", f"is given, and the output is {request.out}", hint=hint)
    if not request.push_to_hub and not is_on_hub(request.out):
        for name, option in _ONLY_HUB.items():
            if getattr(request, name, None) not in {None, False}:
                sentence = f"is given ({option}), but nothing is pushed"
                hint = f"add --push-to-hub ORG/NAME, or leave out {option}"
                if name == "revision":
                    hint += "; that of a base or an adapter follows its name: org/name@REVISION"
                raise RequestError("", 0, name, sentence, hint=hint)
        return request
    if request.offline:
        raise RequestError(
            "", 0, "offline", "is given, and a push needs the network", hint="leave out one of the two"
        )
    if request.out or not isinstance(request, Request):
        return request
    repo, branch = parse_target(request.push_to_hub or "", "push_to_hub")
    return replace(request, out=str(Push(repo, branch)), push_to_hub=None)


def message_of(planned: Planned) -> str:
    """Return the message of the commit that pushes a merge: what is merged into what."""
    return f"Merge {listing([place.text for place in planned.adapters])} into {planned.base.text}"[
        :MOST_MESSAGE
    ]


def card_of(planned: Planned) -> str:
    """Return the model card of a merge as far as it is known before it: its front matter is complete."""
    return card_text(provenance_of(planned), planned.plan, {})


def push_of(request: Request | ConvertRequest | ExtractRequest, message: str = "") -> Push | None:
    """Return the push that a request asks for; None where there is none.

    Args:
        request: the request.
        message: of the commit, where the request has none.

    Raises:
        RequestError: the repo, or its branch, cannot be one.
    """
    is_hub = is_on_hub(request.out)
    text = request.out if is_hub else request.push_to_hub
    if not text:
        return None
    repo, branch = parse_target(text, "out" if is_hub else "push_to_hub")
    if request.revision and branch and request.revision != branch:
        sentence = f"is {request.revision}, and the repo is given with another branch ({branch})"
        raise RequestError("", 0, "revision", sentence, hint="leave out one of the two")
    return Push(
        repo,
        branch or request.revision or "",
        None if request.visibility is None else request.visibility == "private",
        request.create_pr,
        request.commit_message or message or "Output of lora-merge",
        request.upload if isinstance(request, Request) else "spool",
        token=request.token,
    )


def check_push(request: Request, planned: Planned | None = None) -> None:
    """Check that an output of this disk may be pushed when it is made: the repo, the token, and the model card if it is known.

    Raises:
        LoraMergeError: it may not, or the Hub cannot be asked.
    """
    push = push_of(request)
    if push is not None and planned is not None:
        _check_no_input(push, planned)
    if push is None or is_on_hub(request.out):
        return
    if request.part or request.seal or is_store_url(request.out):
        sentence = f"is given, and the output is {'shared by several processes' if request.part or request.seal else request.out}"
        hint = "push an output of this disk, or leave out --out: then nothing stays on this machine"
        raise RequestError("", 0, "push_to_hub", sentence, hint=hint)
    card = card_of(planned) if planned is not None else ""
    check_target(push, MARKS, card, overwrite=request.overwrite or request.resume)


def _check_no_input(push: Push, planned: Planned) -> None:
    """Check that the output does not replace the base or an adapter where they were read.

    Raises:
        RequestError: it would.
    """
    if push.is_left_open:
        return
    for what, place in [("base", planned.base), *(("adapter", place) for place in planned.adapters)]:
        source = place.repo.origin.source if place.repo else None
        if source and source.host == "hf" and source.repo == push.repo:
            if (source.revision or "main") != (push.branch or "main"):
                continue
            sentence = f"is {push.repo}, which is the repo of the {what}, and the output would replace it"
            hint = "choose another repo, another branch with --revision, or --create-pr"
            raise RequestError("", 0, "push_to_hub", sentence, hint=hint)


def push_made(planned: Planned, root: str, watch: Observer) -> str:
    """Push an output of this disk that is complete, where that was asked for; return where people see it, else an empty text.

    Raises:
        LoraMergeError: the Hub refuses something. The output stays.
    """
    request = planned.request
    push = None if is_on_hub(root) else push_of(request, message_of(planned))
    if push is None:
        return ""
    return push_folder(
        Path(root.removeprefix("file://")),
        push,
        MARKS,
        watch,
        overwrite=request.overwrite,
    )


def spooled(push: Push, request: Request, files: Sequence[int], n_workers: int) -> tuple[int, int]:
    """Return how many files may be spooled at a time, and their bytes at most.

    Args:
        push: the push.
        request: may have a limit.
        files: bytes of each file, or of those that are made together.
        n_workers: that would be used otherwise.

    Raises:
        RequestError: one file is larger than the limit.
    """
    largest = sorted(files, reverse=True)[:n_workers]
    if push.way != "spool" or not largest:
        return n_workers, 0
    limit = max(SPOOL_BYTES, largest[0])
    if request.spool_limit is not None:
        limit = parse_size(request.spool_limit)
        if limit < largest[0]:
            sentence = (
                f"is {size_text(limit)}, but the largest file of the output has {size_text(largest[0])}"
            )
            hint = "raise it, pass a smaller --max-shard-size, or --upload stream"
            raise RequestError("", 0, "spool_limit", sentence, hint=hint)
    n = max(n for n in range(1, len(largest) + 1) if sum(largest[:n]) <= limit)
    return n, sum(largest[:n])
