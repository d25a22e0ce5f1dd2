"""Where the bytes of one weight file go on their way to the Hub: to a file on this disk, or into a stream."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_merge.errors import RequestError, WriteError
from lora_merge.runtime.temporary import SPOOLS, folder_for
from lora_merge.storage.hub.uploads.failures import sending
from lora_merge.storage.objects.store import Entry, Receipt
from lora_merge.storage.writing import write_error, write_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lora_merge.storage.hub.uploads.pull_request import PullRequest
    from lora_merge.storage.hub.uploads.push import Push

KNOWN = ("1.31", "2.4")
"""Releases of huggingface_hub whose commits take a file that was uploaded as a stream. Its public interface does not have that."""

_ROOM = "set TMPDIR to a disk with room, pass a smaller --spool-limit or --max-shard-size, or --upload stream"

_SAMPLE_BYTES = 512
"""The first bytes of a file, from which the Hub tells its kind."""


class Way(Protocol):
    """How files get to the Hub."""

    def file(self, name: str, nbytes: int) -> contextlib.AbstractContextManager[Sink]:
        """Take a file in the block; when it ends, the Hub has its bytes, and no commit yet.

        Raises:
            WriteError: the disk or the Hub refused something.
        """


class Sink:
    """One file (a `storage.objects.store.FileSink`).

    Args:
        take: takes the next bytes, which may be reused afterwards.
        text: names the file, for messages.
        nbytes: its size.
    """

    def __init__(self, take: Callable[[memoryview], None], text: str, nbytes: int) -> None:
        self._take, self._text, self._nbytes = take, text, nbytes
        self._digest, self._n_taken = hashlib.sha256(), 0
        self._receipt: Receipt | None = None
        self.sample = b""
        """Its first bytes."""

    def write(self, block: memoryview) -> None:
        """Take the next bytes.

        Raises:
            WriteError: they were refused.
        """
        if len(self.sample) < _SAMPLE_BYTES:
            self.sample += bytes(block[: _SAMPLE_BYTES - len(self.sample)])
        self._take(block)
        self._digest.update(block)
        self._n_taken += block.nbytes

    def copy(self, source: str, start: int, nbytes: int) -> bool:
        """Return False: the Hub copies whole files only."""
        del source, start, nbytes
        return False

    @property
    def sha256(self) -> str:
        """Of what was written, in hexadecimal digits."""
        return self._digest.hexdigest()

    @property
    def receipt(self) -> Receipt:
        """What was sent."""
        assert self._receipt is not None
        return self._receipt

    def check_whole(self) -> None:
        """Check that all bytes have come.

        Raises:
            WriteError: some have not.
        """
        if self._n_taken != self._nbytes:
            raise WriteError(f"{self._text}: {self._n_taken} bytes were written of {self._nbytes}")

    def close(self) -> None:
        """The Hub has the file."""
        self._receipt = Receipt(self._nbytes, self.sha256, f"sha256:{self.sha256}")

    @property
    def entry(self) -> Entry:
        """Size and SHA-256 of what was written."""
        return Entry(self._nbytes, self.sha256)


class Spool:
    """Files are written to this disk, uploaded when they are complete, and removed.

    Args:
        pull: where they go.
    """

    def __init__(self, pull: PullRequest) -> None:
        self._pull = pull
        self._folder = folder_for(self, spool_place())

    @contextlib.contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[Sink]:
        """Take a file, then upload it.

        Raises:
            WriteError: the disk or the Hub refused something.
        """
        path = self._folder / name.replace("/", "__")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as exc:
            raise write_error(path, exc) from exc
        at = 0

        def take(block: memoryview) -> None:
            nonlocal at
            try:
                write_from(fd, block, at, path)
            except WriteError as exc:
                exc.hint = _ROOM
                raise
            at += block.nbytes

        try:
            sink = Sink(take, name, nbytes)
            try:
                yield sink
                sink.check_whole()
            finally:
                os.close(fd)
            self._pull.upload(name, path, sink.entry)
            sink.close()
        finally:
            path.unlink(missing_ok=True)


class Stream:
    """Files are uploaded while they are made, and no disk is needed.

    Args:
        pull: where they go.
        push: the same in the user's words.
        endpoint: of the Hub.
    """

    def __init__(self, pull: PullRequest, push: Push, endpoint: str) -> None:
        self._pull, self._push, self._endpoint = pull, push, endpoint

    @contextlib.contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[Sink]:
        """Send a file as it comes.

        Raises:
            WriteError: the Hub refused something.
        """
        import hf_xet

        with contextlib.ExitStack() as stack:
            with sending(self._push, name):
                upload = stack.enter_context(self._begun())
                stream = upload.start_upload_stream(name=name, sha256=hf_xet.COMPUTE_SHA256)

            def take(block: memoryview) -> None:
                with sending(self._push, name):
                    stream.write(bytes(block))

            sink = Sink(take, name, nbytes)
            yield sink
            sink.check_whole()
            with sending(self._push, name):
                info = stream.finish().xet_info
                stack.close()
        sent = self._pull.keep(name, _operation(name, info, sink.sample))
        if sent != sink.entry:
            sentence = (
                f"{name}: other bytes were sent than were written (SHA-256 {sent.version}, not {sink.sha256})"
            )
            raise WriteError(sentence, hint="run again with --resume, and without --upload")
        sink.close()

    def _begun(self) -> Any:
        """Return an upload to the repo's storage; its context sends what is left when it ends."""
        from urllib.parse import quote

        from huggingface_hub.utils import build_hf_headers
        from huggingface_hub.utils._xet import (
            XetTokenType,
            get_xet_session,
            xet_connection_info_refresh_url,
            xet_headers_without_auth,
        )

        url = xet_connection_info_refresh_url(
            token_type=XetTokenType.WRITE,
            repo_id=self._push.repo,
            repo_type="model",
            revision=quote(self._pull.reference, safe=""),
            endpoint=self._endpoint,
        )
        headers = build_hf_headers(token=self._push.token, library_name="lora-merge")
        return get_xet_session().new_upload_commit(
            token_refresh_url=url,
            token_refresh_headers=headers,
            custom_headers=xet_headers_without_auth(headers),
        )


def _operation(name: str, info: Any, sample: bytes) -> Any:
    """Return the entry of a commit for a file that the Hub's storage has already."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    operation = CommitOperationAdd(name, b"")
    operation.upload_info = UploadInfo(size=info.file_size, sample=sample, sha256=bytes.fromhex(info.sha256))
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True  # noqa: SLF001
    return operation


def check_streams() -> None:
    """Check that the installed packages can upload a stream.

    Raises:
        RequestError: they cannot, or it is not known.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils._runtime import is_xet_available

    hint = "leave out --upload: files are then spooled on this disk"
    version = str(huggingface_hub.__version__)
    if constants.HF_HUB_DISABLE_XET or not is_xet_available():
        raise RequestError("", 0, "upload", "is stream, which needs the package hf_xet", hint=hint)
    if not any(version.startswith(f"{known}.") for known in KNOWN):
        sentence = f"is stream, which is known to work with huggingface_hub {' and '.join(KNOWN)} only, not with {version}"
        raise RequestError("", 0, "upload", sentence, hint=hint)


def spool_place() -> Path:
    """Return the folder in which the spool is: ``TMPDIR``, else ``/var/tmp``, which is on a disk, else the system's own.

    Raises:
        RequestError: ``TMPDIR`` cannot be written to.
    """
    kept, asked = SPOOLS, os.environ.get("TMPDIR")
    if asked:
        # The standard library would take another folder without a word, and that may be small.
        try:
            with tempfile.TemporaryFile(dir=asked):
                return Path(asked)
        except OSError as exc:
            sentence = f"writes weight files to this disk first, and TMPDIR is {asked} ({exc.strerror})"
            hint = "set TMPDIR to a folder on a disk with room, or pass --upload stream"
            raise RequestError("", 0, "upload", sentence, hint=hint) from exc
    return kept if os.access(kept, os.W_OK) else Path(tempfile.gettempdir())
