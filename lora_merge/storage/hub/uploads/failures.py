"""What went wrong while something was sent to the Hub: errors of its packages → one sentence each, without the token."""

from __future__ import annotations

import contextlib
import errno
import re
import textwrap
import time
from typing import TYPE_CHECKING, TypeVar

from lora_merge.errors import LoraMergeError, WriteError
from lora_merge.redaction import without_secrets
from lora_merge.storage.hub.downloads import is_named

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.storage.hub.uploads.push import Push

T = TypeVar("T")

WAITS = (1, 4, 15, 30, 60)
"""Seconds between the tries of one request. The package itself repeats requests of some kinds, for seconds."""

SILENCE_SECONDS = 300.0
"""After so long without a byte, a request counts as one without an answer. The package itself waits for ever."""

_FOR_A_WHILE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that may answer otherwise in a moment."""

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

_LIMITS = ("storage limit", "storage patterns", "quota", "more storage", "upgrade your plan")
"""Words of the Hub's answers to an account that has no room left."""

_BILLING = "https://huggingface.co/settings/billing"

_IN_TEXT = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
"""How hf_xet says a status. The Hub's own sentence is lost there."""

_TOKEN_HINT = "pass --token, set HF_TOKEN or run `hf auth login`, with a token that can write"  # noqa: S105 - advice

RESUME = "--resume continues the run, and what was uploaded is kept"

_SHOWN = 200
"""Characters of the Hub's own sentence."""


class UnansweredError(WriteError):
    """A request failed in a way that may pass: it is made again."""


class UnreachedError(UnansweredError):
    """A request got no answer at all."""


class ConflictError(WriteError):
    """Something else has written to the same place."""


def repeated(ask: Callable[[], T], *, is_begun: bool = True) -> T:
    """Return what a function answers; ask again after a while when the Hub does not answer.

    Args:
        ask: makes a request.
        is_begun: something would be lost by an end. Before that, a Hub that cannot be reached is not waited for.

    Raises:
        WriteError: it does not, after all tries, or it refuses.
    """
    for wait in WAITS if is_begun else WAITS[:2]:
        try:
            return ask()
        except UnansweredError as exc:
            if isinstance(exc, UnreachedError) and not is_begun:
                raise
            time.sleep(wait)
    return ask()


@contextlib.contextmanager
def sending(push: Push, what: str = "") -> Iterator[None]:
    """Turn errors of huggingface_hub and hf_xet into one sentence each.

    Args:
        push: where to.
        what: the file that is sent, if it is one.

    Raises:
        WriteError: for each of them.
    """
    from huggingface_hub import errors

    _limit_silence()
    try:
        yield
    except LoraMergeError:
        raise
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as exc:
        # It holds the request, and that the token.
        raise _said(push, what, exc) from None


def _limit_silence() -> None:
    """Have requests end that get no answer; where the user has set a limit, it stays."""
    from huggingface_hub.utils import get_session

    client = get_session()
    if client.timeout.read is None:
        client.timeout = SILENCE_SECONDS


def status_of(exc: BaseException) -> int:
    """Return the HTTP status of an error, or of what caused it; 0 where there is none."""
    for one in _chain(exc):
        if code := getattr(getattr(one, "response", None), "status_code", 0):
            return int(code)
        if found := _IN_TEXT.search(str(one)):
            return int(found[1])
    return 0


def _said(push: Push, what: str, exc: BaseException) -> WriteError:
    """Return the error as one of ours, with the token taken out."""
    error = _error(push, f"{push}/{what}" if what else str(push), exc)
    return type(error)(without_secrets(str(error), [push.token]), hint=error.hint)


def _error(push: Push, subject: str, exc: BaseException) -> WriteError:
    status, said = status_of(exc), _words(exc)
    if any(words in said.lower() for words in _LIMITS) and status in {0, 400, 402, 403, 413, 507}:
        hint = f"free storage at {_BILLING}, or ask for more; then {RESUME}"
        return WriteError(f"{subject}: the Hub takes no more bytes ({said})", hint=hint)
    if status in {401, 403, 404} or is_named(exc, "LocalTokenNotFound", "RepositoryNotFound"):
        return _refused(push, subject, status, "" if _IN_TEXT.search(said) else said)
    if status in {409, 412}:
        hint = "run again while nothing else writes to it"
        return ConflictError(f"{subject}: something else writes there too ({said})", hint=hint)
    if status in _FOR_A_WHILE:
        return UnansweredError(f"{subject}: the Hub answered with status {status}", hint="run again later")
    if status:
        return WriteError(f"{subject}: the Hub answered with status {status} ({said})")
    return _without_answer(subject, exc, said)


def _refused(push: Push, subject: str, status: int, said: str) -> WriteError:
    """Return the error for a token that is missing, wrong, or that may not do what it is used for."""
    if status == 403 and not said:
        sentence = (
            f"{subject}: the Hub does not take it: no storage is left, or the token may not write there"
        )
        hint = f"look at {_BILLING}, and use a token that may write to {push.repo}; then {RESUME}"
        return WriteError(sentence, hint=hint)
    if status == 403:
        sentence = f"{subject}: the token may not do this ({said})"
        return WriteError(sentence, hint=f"use one that may write to {push.repo}; then {RESUME}")
    if status == 404:
        return WriteError(
            f"{subject}: does not exist, or the token may not see it ({said})", hint=_TOKEN_HINT
        )
    sentence = "does not accept the token" if status else "asks for a token, and there is none"
    return WriteError(f"{subject}: the Hub {sentence}", hint=_TOKEN_HINT)


def _without_answer(subject: str, exc: BaseException, said: str) -> WriteError:
    """Return the error for a request that got no answer: the disk, the network, or a package."""
    if is_named(exc, "OfflineMode"):
        return WriteError(f"{subject}: offline mode is on", hint="unset HF_HUB_OFFLINE")
    for one in _chain(exc):
        if isinstance(one, OSError) and one.errno in _FULL:
            return WriteError(
                f"{subject}: no space left on the disk of the spool", hint="set TMPDIR to another disk"
            )
    if isinstance(exc, OSError) and exc.filename:
        sentence = f"{subject}: {exc.filename}: {exc.strerror} (a file of this disk)"
        return WriteError(sentence, hint="set TMPDIR to a folder that can be written to")
    if is_named(exc, "ValueError", "ValidationError"):
        return WriteError(f"{subject}: the Hub refuses it ({said})")
    sentence = f"{subject}: the Hub cannot be reached ({type(exc).__name__}: {said})"
    return UnreachedError(sentence, hint="check the network, proxies and HF_ENDPOINT, and run again")


def _words(exc: BaseException) -> str:
    """Return the Hub's own sentence about an error, or the error's, in one short line."""
    chain = _chain(exc)
    said = next((text for one in chain if (text := getattr(one, "server_message", None))), None)
    text = said or next((str(one) for one in reversed(chain) if str(one).strip()), type(exc).__name__)
    return textwrap.shorten(text, _SHOWN, placeholder=" …")


def _chain(exc: BaseException) -> list[BaseException]:
    """Return an error and its causes."""
    chain: list[BaseException] = []
    current: BaseException | None = exc
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    return chain
