"""Errors of the package huggingface_hub, in one sentence each, without the token."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

from lora_merge.errors import ResolveError
from lora_merge.redaction import without_secrets
from lora_merge.storage.hub.cache import cached_root
from lora_merge.storage.hub.downloads import is_named

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.storage.hub.repo import Access
    from lora_merge.storage.source import Source

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def hub_errors(source: Source, access: Access) -> Iterator[None]:
    """Turn errors of huggingface_hub into one sentence each.

    Raises:
        ResolveError: for each of them.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.LocalEntryNotFoundError as exc:  # it hides why the download failed
        raise _said(source, exc.__cause__ or exc, access) from None
    except (errors.HTTPError, OSError, ValueError, RuntimeError) as exc:
        raise _said(source, exc, access) from None  # it holds the request, and that the token


def _said(source: Source, exc: BaseException, access: Access) -> ResolveError:
    """Return the error as one of ours, with the token taken out."""
    error = _hub_error(source, exc)
    return ResolveError(without_secrets(str(error), [access.token]), hint=error.hint)


def _hub_error(source: Source, exc: BaseException) -> ResolveError:
    from huggingface_hub import errors

    status = getattr(getattr(exc, "response", None), "status_code", 0)
    pass_token = "pass --token, set HF_TOKEN or run `hf auth login`"  # noqa: S105 - advice
    # A disabled repo answers 403 too, and accepting a licence does not open it.
    if isinstance(exc, errors.GatedRepoError) or (status == 403 and not is_named(exc, "Disabled")):
        sentence = "is gated or private, and you have no access"
        hint = f"accept the licence at https://huggingface.co/{source.repo}, then {pass_token}"
    elif isinstance(exc, errors.RevisionNotFoundError):
        sentence = f"the repo has no revision {source.wanted}"
        hint = "write a folder before the @: org/name/FOLDER@REVISION" if "/" in source.wanted else ""
    elif isinstance(exc, errors.RepositoryNotFoundError):
        local = "" if source.explicit else "this directory does not exist, and "
        sentence = f"{local}the Hub has no such repo, or it is private"
        hint = f"check the spelling; for a private repo {pass_token}"
    elif status == 401:
        sentence, hint = "the Hub does not accept the token", f"{pass_token} again"
    elif status:
        sentence, hint = (
            f"the Hub answered with status {status}",
            "try again later; downloaded files are kept",
        )
    elif isinstance(exc, errors.HTTPError | errors.OfflineModeIsEnabled):
        return _unreachable(source, exc)
    else:
        return _not_stored(source, exc)
    return ResolveError(f"{source}: {sentence}", hint=hint)


def _unreachable(source: Source, exc: BaseException) -> ResolveError:
    root = cached_root(source)
    hint = "check the network, proxies and HF_ENDPOINT; complete files are kept"
    if root is not None:
        hint = f"pass --offline to use commit {root.name} from the local cache"
    local = "" if source.explicit else "this directory does not exist, and "
    return ResolveError(f"{source}: {local}the Hub cannot be reached ({type(exc).__name__})", hint=hint)


def _not_stored(source: Source, exc: BaseException) -> ResolveError:
    """Return the error for a download that failed on this machine, or came short."""
    if isinstance(exc, OSError) and exc.errno in _DISK_ERRORS:
        hint = "free disk space, or set HF_HOME to a folder on another disk (default: ~/.cache/huggingface)"
        return ResolveError(f"{source}: cannot be stored in the cache ({exc.strerror})", hint=hint)
    reason = str(exc).strip().partition("\n")[0]
    return ResolveError(
        f"{source}: the download failed ({reason})", hint="run again; complete files are kept"
    )
