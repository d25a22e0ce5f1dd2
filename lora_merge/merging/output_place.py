"""Where the output of a request goes: the storage, and what the run wants of its place."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lora_merge.errors import RequestError, WriteError
from lora_merge.executors import RAY
from lora_merge.merging.hf_checkpoint import MARKS
from lora_merge.merging.made_already import finds_whole
from lora_merge.merging.made_from import told_of
from lora_merge.merging.pushing import card_of, check_push, message_of, push_of
from lora_merge.storage.destination import Wish
from lora_merge.storage.destinations import storage_of
from lora_merge.storage.hub.uploads.push import is_on_hub

if TYPE_CHECKING:
    from lora_merge.planning.run import Planned
    from lora_merge.requests.request import Request
    from lora_merge.storage.destination import Storage


def place_of(request: Request, *, dry_run: bool) -> tuple[str, Storage]:
    """Return the absolute path or URL of the output, and the storage that it goes to.

    Raises:
        ResolveError: the text cannot be a path or a URL.
        WriteError: it is in a store that does not take the output.
    """
    storage = storage_of(request.out)
    out = storage.path(request.out)
    check_push(request)
    if is_on_hub(out) and (request.part or request.seal):
        option = "seal" if request.seal else "part"
        hint = f"leave out --{option}, or write to a store, such as s3://bucket/folder, and push from there"
        sentence = f"is given, but {out} is on the Hub, where one process makes the whole output"
        raise RequestError("", 0, option, sentence, hint=hint)
    if _is_shared(request) and not storage.takes_files:
        out, storage = _in_whole_files(out)
    if storage.takes_files and (is_on_hub(out) or not dry_run):
        _check_place(request, out, storage)
    return out, storage


def place_of_job(request: Request) -> tuple[str, Storage]:
    """Return the same for a job of a batch, before anything is checked.

    Raises:
        ResolveError: the text cannot be a path or a URL.
    """
    storage = storage_of(request.out)
    out = storage.path(request.out)
    return _in_whole_files(out) if _is_shared(request) and not storage.takes_files else (out, storage)


def _is_shared(request: Request) -> bool:
    """Return True where several processes may write, perhaps on several machines."""
    return request.seal or request.part is not None or request.executor == RAY


def _in_whole_files(out: str) -> tuple[str, Storage]:
    # Processes that share an output on a filesystem write whole files, too: no two of them write into one page.
    url = f"file://{out}"
    return url, storage_of(url)


def _check_place(request: Request, out: str, storage: Storage) -> None:
    """Check that a store takes the output, before a base or an adapter is read from another one.

    Raises:
        LoraMergeError: it does not.
    """
    wish = wish_of(request, out)
    # Of a complete output nothing is written, so no right is needed.
    if finds_whole(wish, storage):
        return
    # A name that is taken is left alone. The check that knows the inputs says more about it.
    try:
        storage.check_replaceable(wish)
    except WriteError:
        return
    storage.check_writable(wish)


def wish_of(request: Request, out: str, planned: Planned | None = None) -> Wish:
    """Return what the run wants of the place of its output; without a plan, without what only that knows."""
    shared: Literal["", "part", "seal"] = "seal" if request.seal else "part" if request.part else ""
    wish = Wish(out, request.resume or bool(shared), request.overwrite, MARKS, (), (), shared)
    wish = replace(wish, push=push_of(request) if is_on_hub(out) else None)
    if planned is None:
        return wish
    wish = replace(
        wish, inputs=planned.read_files(), stored_inputs=planned.stored_files(), told=told_of(planned)
    )
    if wish.push is None:
        return wish
    return replace(wish, push=push_of(request, message_of(planned)), card=card_of(planned))
