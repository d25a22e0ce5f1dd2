"""May an output have a prefix of a store: what is there now, and is an input inside or around it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lora_merge.core.checkpoint import CONFIG_FILE
from lora_merge.errors import ResolveError, WriteError
from lora_merge.storage.objects import store_at
from lora_merge.storage.objects.settings import PROBE
from lora_merge.storage.objects.urls import parse_store_url, path_here
from lora_merge.storage.replaceable import check_writable
from lora_merge.storage.store_staging import beside
from lora_merge.words import choice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lora_merge.storage.destination import Wish
    from lora_merge.storage.objects.store import Entry
    from lora_merge.storage.objects.urls import StoreUrl
    from lora_merge.storage.store_staging import Run


def output_url(text: str) -> StoreUrl:
    """Return the URL of an output.

    Raises:
        ResolveError: the text is not the URL of a store.
    """
    url = parse_store_url(text)
    if url is None:
        raise ResolveError(f"{text}: is not the URL of a store", hint="write s3://bucket/folder, for example")
    return url


def check_apart(url: StoreUrl, wish: Wish) -> None:
    """Check that neither of an output and an input is inside the other.

    Raises:
        WriteError: one is.
    """
    out, hint = f"{url}/", "choose another --out, outside of the inputs"
    own = [f"file://{os.path.realpath(path)}" for path in wish.inputs] if url.scheme == "file" else []
    for text in (*own, *wish.stored_inputs):
        if f"{text}/".startswith(out):
            raise WriteError(f"{url}: contains the input {text}", hint=hint)
    for folder in {*own, *(text.rpartition("/")[0] for text in wish.stored_inputs)}:
        if out.startswith(f"{folder}/"):
            raise WriteError(f"{url}: is inside the input {folder}", hint=hint)


def check_free(url: StoreUrl, wish: Wish, entries: Mapping[str, Entry], run: Run | None) -> None:
    """Check that an output may have a prefix.

    Args:
        url: of the output.
        wish: what the run wants.
        entries: what is there.
        run: whose staging is beside it.

    Raises:
        WriteError: it may not.
    """
    is_old = CONFIG_FILE in entries or (run is None and any(mark in entries for mark in wish.marks))
    if is_old and not wish.overwrite:
        raise WriteError(f"{url}: already exists", hint="choose another --out, or pass --overwrite")
    # Without a configuration, files beside staging are those of a run that has not ended well.
    if entries.keys() - {PROBE} and not is_old and run is None:
        sentence = f"{url}: already exists and is not a model checkpoint (it has no {choice(wish.marks)})"
        raise WriteError(
            sentence, hint="choose another --out, or delete it yourself: --overwrite does not replace it"
        )


def check_may_write(url: StoreUrl) -> None:
    """Check that files can be made and deleted in an output's prefix, and in staging beside it.

    Raises:
        WriteError: they cannot.
    """
    here = path_here(str(url))
    if here is not None:
        # Asked and not tried: a directory goes with its last file, and another process may just begin one in it.
        check_writable(here)
        return
    for place in (url, beside(url)):
        store_at(place).check_writable()


def locked(url: StoreUrl, run: Run, merge: str, told: Mapping[str, str]) -> WriteError:
    """Return the error for an output that another run has begun, and has not said that it ended.

    Args:
        url: of the output.
        run: that one.
        merge: the fingerprint of the present merge.
        told: the same in words.
    """
    if run.merge == merge:
        sentence = f"{url}: another run of this merge has begun this output ({run.who})"
        hint = "pass --resume to continue it"
        if not run.is_gone:
            hint = f"if no process of it runs any more, {hint}; else wait for it"
        return WriteError(sentence, hint=hint)
    sentence = f"{url}: another merge has begun this output ({run.who}): {run.other_than(told)}"
    hint = (
        "to finish that merge, repeat its command, with --resume where it had no --part; to drop it, wait until none of "
        "its processes runs, then delete "
        f"{beside(url)}/ and the weight files in {url}/"
    )
    return WriteError(sentence, hint=hint)
