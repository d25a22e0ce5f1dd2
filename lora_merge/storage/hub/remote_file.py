"""One file of the Hugging Face Hub at a commit, read by ranges: a request for where it is, and one for each range.

The Hub answers with the file's version and redirects to a storage network, whose signed addresses need no token and are
valid for about an hour. The token is sent to the Hub's own host only.
"""

from __future__ import annotations

import contextlib
import errno
import re
import threading
import time
from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lora_merge.errors import CheckpointError, ResolveError
from lora_merge.storage import input_files
from lora_merge.storage.hub.hub_errors import hub_errors
from lora_merge.storage.hub.repo import Access
from lora_merge.storage.objects.store import Entry
from lora_merge.storage.source import Source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.core.identity import FileIdentity
    from lora_merge.storage.source import HubFile

WAITS = (0.5, 1, 2, 4, 8, 16, 16, 16)
"""Seconds between the tries of one request."""

_MOST_WAIT = 300
"""Seconds that a server may ask for."""

_FOR_A_WHILE = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of a server that may answer otherwise in a moment."""

_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")

_AGAIN = "try again later; --resume continues a run that has begun"

_TOKENS: dict[str, str | None] = {}
"""Repo → the token that this process was given for it. Texts and plans hold none, so workers in other processes use HF_TOKEN."""


def use_token(repo: str, token: str | None) -> None:
    """Send a token with requests for files of a repo; None leaves it to ``HF_TOKEN`` and the login."""
    _TOKENS[repo] = token


@cache
def remote_file(file: HubFile) -> RemoteFile:
    """Return the file as this process reads it: where it is has to be asked once only."""
    return RemoteFile(file)


class _UnansweredError(Exception):
    """A request failed in a way that may pass: it is made again."""

    def __init__(self, said: str, wait: float = 0) -> None:
        super().__init__(said)
        self.wait = wait


class RemoteFile:
    """A file at a commit. Several threads may read it at once.

    Args:
        file: which one.
    """

    def __init__(self, file: HubFile) -> None:
        self._file, self._text = file, str(file)
        self._lock = threading.Lock()
        self._address = ""
        """Where its bytes are; empty until that is asked for, and after that address was refused."""

    def version(self) -> FileIdentity:
        """Ask the Hub which version the file has now.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the Hub cannot be asked, or refuses.
        """
        from huggingface_hub import errors, get_hf_file_metadata

        found = None
        with self._said(), contextlib.suppress(errors.EntryNotFoundError):
            found = get_hf_file_metadata(
                self._url(), token=self._token, library_name="lora-merge", retry_on_errors=True
            )
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "No such file at this commit", self._text)
        if found.size is None:
            raise CheckpointError(
                self._text, "", "the Hub does not say how many bytes it has", hint="leave out --stream-base"
            )
        with self._lock:
            self._address = found.location
        return Entry(found.size, found.etag or "").identity

    def fetch(self, version: FileIdentity, start: int, end: int) -> memoryview:
        """Return a range of one version. What may pass is tried again.

        Raises:
            ChangedError: the file has another version now.
            CheckpointError: it cannot be read.
        """
        refused = ""
        for wait in (*WAITS, None):
            address = self._address_of(version, refused)
            try:
                return self._asked(address, version, start, end)
            except _RefusedError as exc:
                # An address has a limited time: the Hub is asked for another one, once.
                if refused:
                    raise CheckpointError(self._text, "", str(exc), hint=_AGAIN) from None
                refused = address
            except _UnansweredError as exc:
                if wait is None:
                    what = f"{exc}, after {len(WAITS)} retries"
                    raise CheckpointError(self._text, "", what, hint=_AGAIN) from None
                time.sleep(max(wait, exc.wait))
        raise AssertionError("the last try returns or raises")

    def _address_of(self, version: FileIdentity, refused: str) -> str:
        """Return where the bytes are; ask the Hub where that is not known, or was refused.

        Raises:
            ChangedError: the Hub has another version.
        """
        with self._lock:
            known = self._address
        if known and known != refused:
            return known
        try:
            now = self.version()
        except FileNotFoundError:
            raise input_files.changed(self._text, "disappeared while it was read") from None
        if now != version:
            raise input_files.changed(self._text)
        return self._address

    def _asked(self, address: str, version: FileIdentity, start: int, end: int) -> memoryview:
        """Return a range, in one request.

        Raises:
            ChangedError: the file has another size.
            CheckpointError: the Hub refuses, or does not serve ranges.
            _RefusedError: the address is not served any more.
            _UnansweredError: no whole answer came.
        """
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import build_hf_headers, get_session

        is_hub = _origin(address) == _origin(self._url())
        headers = build_hf_headers(token=self._token if is_hub else False, library_name="lora-merge")
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        try:
            with get_session().stream(
                "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                self._check(response, version, start, end)
                return _body(response, end - start)
        except (
            errors.HTTPError,
            RuntimeError,
            OSError,
        ) as exc:  # RuntimeError: another thread closed the session
            # Its message has the address, which is signed.
            raise _UnansweredError(f"{_named(address)} does not answer ({type(exc).__name__})") from None

    def _check(self, response: Any, version: FileIdentity, start: int, end: int) -> None:
        """Check that an answer is the range that was asked for.

        Raises:
            ChangedError: the file has another size.
            CheckpointError: the Hub refuses, or does not serve ranges.
            _RefusedError: the address is not served any more.
            _UnansweredError: the server may answer otherwise in a moment.
        """
        status, headers = response.status_code, response.headers
        found = _RANGE.fullmatch(headers.get("Content-Range", ""))
        if status == 206 and found and int(found[1]) == start and int(found[2]) == version.size:
            return
        # A file that was asked for as a whole may come as one.
        if status == 200 and (start, end) == (0, version.size):
            return
        if status == 416 or (status == 206 and found and int(found[2]) != version.size):
            raise input_files.changed(self._text)
        host = _named(str(response.url))
        if status in _FOR_A_WHILE:
            raise _UnansweredError(f"{host} answered with status {status}", _asked_wait(headers))
        if status in {200, 206}:
            hint = "leave out --stream-base: the file is downloaded then"
            raise CheckpointError(
                self._text, "", f"{host} does not serve ranges of it", "an answer with status 206", hint=hint
            )
        raise _RefusedError(f"{host} answered with status {status}")

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        """Turn errors of huggingface_hub into those of a file.

        Raises:
            CheckpointError: for each of them.
        """
        source = Source("hf", self._file.repo, "", self._file.commit)
        try:
            with hub_errors(source, Access(self._token)):
                yield
        except ResolveError as exc:
            what = exc.without_hint.removeprefix(f"{source}: ")
            raise CheckpointError(self._text, "", what, hint=exc.hint) from None

    @property
    def _token(self) -> str | None:
        return _TOKENS.get(self._file.repo)

    def _url(self) -> str:
        from huggingface_hub import constants, hf_hub_url

        file = self._file
        url = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=constants.ENDPOINT)
        return str(url)


class _RefusedError(Exception):
    """A storage network refuses an address: its time may be over."""


def _body(response: Any, nbytes: int) -> memoryview:
    """Return the bytes of an answer.

    Raises:
        _UnansweredError: there are fewer, or more.
    """
    content, n_read = memoryview(bytearray(nbytes)), 0
    for chunk in response.iter_bytes():
        if n_read + len(chunk) > nbytes:
            raise _UnansweredError(f"the answer has more than the {nbytes} bytes of the range")
        content[n_read : n_read + len(chunk)] = chunk
        n_read += len(chunk)
    if n_read < nbytes:
        raise _UnansweredError(f"the answer has {n_read} bytes, expected {nbytes}")
    return content


def _asked_wait(headers: Any) -> float:
    """Return the seconds that a server asks to wait for; 0 where it says nothing that is understood."""
    said = headers.get("Retry-After", "")
    return min(int(said), _MOST_WAIT) if said.isascii() and said.isdigit() else 0


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _named(address: str) -> str:
    """Return the host of an address. The rest may be a signature."""
    return urlsplit(address).hostname or "the Hub"
