"""One file that goes to S3 in parts, through boto3: parts that are sent, and parts that the store copies by itself.

Each part that is sent has a checksum, which the store compares. The checksums of all parts together are that of the file,
which the store compares when it puts the parts together, and states afterwards.

References:
    CRC64NVME, "full object": docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import base64
import contextlib
import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_merge.errors import WriteError
from lora_merge.storage import input_files
from lora_merge.storage.digests import checksum_text
from lora_merge.storage.objects.failures import code_of, reading, writing
from lora_merge.storage.objects.parts import PARTS_UNDER_WAY, SizedUpload, part_bytes
from lora_merge.storage.objects.store import Receipt, match_of, version_of
from lora_merge.storage.objects.urls import StoreUrl, parse_store_url

if TYPE_CHECKING:
    from collections.abc import Callable

ALGORITHM = "CRC64NVME"

LEAST_PART_BYTES = 5 << 20
"""Of every part but the last: a limit of S3."""

MOST_COPY_BYTES = 1 << 30
"""Of one part that is copied; S3 takes 5 GiB."""

MOST_PARTS = 10_000

_TRIES = 3
"""Of a part that arrived damaged. boto3 itself repeats requests that were not answered."""

_DAMAGED = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "InvalidDigest",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)


@dataclass(frozen=True, slots=True)
class _Part:
    """A part that the store has."""

    number: int
    etag: str
    nbytes: int
    crc: int | None
    """None where the store copied it, and did not say."""


class CopyingUpload(SizedUpload):
    """A file that goes up in parts (a `FileSink`).

    Args:
        client: boto3's.
        url: the folder.
        name: of the file in it.
        nbytes: of the file.
    """

    def __init__(self, client: Any, url: StoreUrl, name: str, nbytes: int) -> None:
        super().__init__(url.child(name), nbytes)
        self._client = client
        self._place = {"Bucket": url.bucket, "Key": f"{url.prefix}/{name}"}
        self._part_bytes = part_bytes(nbytes)
        self._part = bytearray()
        self._upload, self._n_parts = "", 0
        self._pool: ThreadPoolExecutor | None = None
        self._under_way: deque[Future[_Part]] = deque()
        self._parts: list[_Part] = []
        self._versions: dict[str, str] = {}

    def write(self, block: memoryview) -> None:
        """Take the next bytes. The block may be reused afterwards.

        Raises:
            WriteError: the store refused something, or there are more bytes than announced.
        """
        block = block.cast("B")
        self._count(len(block))
        while len(block):
            count = min(self._part_bytes - len(self._part), len(block))
            self._part += block[:count]
            block = block[count:]
            if len(self._part) == self._part_bytes:
                self._send()

    def copy(self, source: str, start: int, nbytes: int) -> bool:
        """Let the store copy the next bytes from another object of S3, where they are enough for a part.

        What was written before must be a part by itself, so some of the first bytes may be read and sent with it.

        Raises:
            ChangedError: the object has changed since a part of it was copied.
            CheckpointError: the object cannot be read.
            WriteError: the store refused something.
        """
        url = parse_store_url(source)
        short = LEAST_PART_BYTES - len(self._part) if 0 < len(self._part) < LEAST_PART_BYTES else 0
        if (
            url is None
            or url.scheme != "s3"
            or nbytes - short < LEAST_PART_BYTES
            or not self._has_room(nbytes)
        ):
            return False
        version = self._version_of(url)
        if short:
            self.write(memoryview(self._read(url, version, start, short)))
        # The first bytes were counted when they were written.
        self._count(nbytes - short)
        self._send()
        for at, count in pieces(start + short, nbytes - short):
            self._submit(self._copy_part, url, version, at, count)
        return True

    def finish(self) -> None:
        """Send the last part, put the parts together, and compare what the store says of the file.

        Raises:
            WriteError: the store refused something, bytes are missing, or the store has other bytes.
        """
        self._check_whole()
        if self._upload:
            self._send()
            self._gather(0)
            expected = self._complete()
        else:
            # Less than a part: the whole file in one request.
            expected = _crc(self._part)
            self._checked(self._client.put_object, Body=self._part, ChecksumCRC64NVME=_base64(expected))
        self._close()
        self.closed_as(self._compared(expected))

    def abort(self) -> None:
        """End the upload; the store forgets its parts. A failure is ignored: a lifecycle rule removes them."""
        for future in self._under_way:
            future.cancel()
        # A part that arrives after the abort would stay.
        self._close()
        if self._upload:
            with contextlib.suppress(Exception):
                self._client.abort_multipart_upload(**self._place, UploadId=self._upload)

    def _has_room(self, nbytes: int) -> bool:
        """Return True where the parts of a copy leave enough numbers for those of all bytes after it."""
        left = self._nbytes - self._written - nbytes
        return self._n_parts + -(-nbytes // MOST_COPY_BYTES) + -(-left // self._part_bytes) + 2 <= MOST_PARTS

    def _send(self) -> None:
        """Hand the part over; a new buffer takes the next one, since this one is still being sent."""
        if self._part:
            content, self._part = self._part, bytearray()
            self._submit(self._send_part, content)

    def _submit(self, job: Callable[..., _Part], *arguments: object) -> None:
        with writing(self._text):
            if not self._upload:
                begun = self._client.create_multipart_upload(
                    **self._place, ChecksumAlgorithm=ALGORITHM, ChecksumType="FULL_OBJECT"
                )
                self._upload = begun["UploadId"]
            if self._pool is None:
                self._pool = ThreadPoolExecutor(PARTS_UNDER_WAY, "upload")
            # Before one more is begun, so that memory holds no more parts than these.
            self._gather(PARTS_UNDER_WAY - 1)
            self._n_parts += 1
            self._under_way.append(self._pool.submit(job, self._n_parts, *arguments))

    def _gather(self, n_left: int) -> None:
        """Wait until no more than some parts are under way."""
        while len(self._under_way) > n_left:
            self._parts.append(self._under_way.popleft().result())

    def _send_part(self, number: int, content: bytearray) -> _Part:
        crc = _crc(content)
        arguments = {"UploadId": self._upload, "PartNumber": number, "Body": content}
        answer = self._checked(self._client.upload_part, **arguments, ChecksumCRC64NVME=_base64(crc))
        return _Part(number, answer["ETag"], len(content), crc)

    def _checked(self, call: Callable[..., Any], **arguments: object) -> Any:
        """Send something with its checksum, again where it arrived damaged.

        Raises:
            botocore.exceptions.ClientError: the store refuses it.
        """
        from botocore.exceptions import ClientError

        for n in range(_TRIES):
            try:
                return call(**self._place, **arguments)
            except ClientError as exc:
                if code_of(exc) not in _DAMAGED or n == _TRIES - 1:
                    raise
        raise AssertionError

    def _copy_part(self, number: int, url: StoreUrl, version: str, start: int, nbytes: int) -> _Part:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.upload_part_copy(
                **self._place,
                UploadId=self._upload,
                PartNumber=number,
                CopySource={"Bucket": url.bucket, "Key": url.prefix},
                CopySourceRange=f"bytes={start}-{start + nbytes - 1}",
                CopySourceIfMatch=match_of(version),
            )["CopyPartResult"]
        except ClientError as exc:
            if code_of(exc) in {"PreconditionFailed", "412"}:
                raise input_files.changed(str(url)) from None
            raise
        stated = answer.get("ChecksumCRC64NVME")
        return _Part(number, answer["ETag"], nbytes, None if stated is None else _number(stated))

    def _version_of(self, url: StoreUrl) -> str:
        """Return the ETag that an object had when this file first needed it."""
        text = str(url)
        if text not in self._versions:
            with reading(text):
                head = self._client.head_object(Bucket=url.bucket, Key=url.prefix)
            self._versions[text] = version_of(head["ETag"])
        return self._versions[text]

    def _read(self, url: StoreUrl, version: str, start: int, nbytes: int) -> bytes:
        """Return some bytes of an object that the store copies the rest of."""
        from lora_merge.storage.objects.scheme import OBJECTS
        from lora_merge.storage.reading import read_unwatched

        content = bytearray(nbytes)
        with OBJECTS.open(str(url)) as source:
            if source.version.tag != version:
                raise input_files.changed(source.text)
            read_unwatched(source, memoryview(content), start)
        return bytes(content)

    def _complete(self) -> int | None:
        """Put the parts together; return the checksum that the file must have, None where a part's is not known."""
        from botocore.exceptions import ClientError

        parts = [{"PartNumber": part.number, "ETag": part.etag} for part in self._parts]
        crc = joined(self._parts)
        stated = {} if crc is None else {"ChecksumCRC64NVME": _base64(crc), "ChecksumType": "FULL_OBJECT"}
        try:
            self._client.complete_multipart_upload(
                **self._place,
                UploadId=self._upload,
                MultipartUpload={"Parts": parts},
                MpuObjectSize=self._nbytes,
                **stated,
            )
        except ClientError as exc:
            # A repeated request finds no upload where the first one was done, and its answer lost. The file is compared next.
            if code_of(exc) != "NoSuchUpload":
                raise
        self._upload = ""
        return crc

    def _compared(self, expected: int | None) -> Receipt:
        """Return what the store says of the file.

        Raises:
            WriteError: it is not what was sent. The file is deleted.
        """
        head = self._client.head_object(**self._place, ChecksumMode="ENABLED")
        stated = (
            head.get("ChecksumCRC64NVME")
            if head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT"
            else None
        )
        crc = None if stated is None else _number(stated)
        if head["ContentLength"] != self._nbytes or (None not in {crc, expected} and crc != expected):
            self._client.delete_object(**self._place)
            raise WriteError(
                f"{self._text}: the store has other bytes than were sent, so the file was deleted",
                hint="run again",
            )
        return Receipt(self._nbytes, version_of(head["ETag"]), "" if crc is None else checksum_text(crc))

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def pieces(start: int, nbytes: int) -> list[tuple[int, int]]:
    """Return a range that the store copies as parts: each ``(start, bytes)``, with as many bytes as a part may have or
    a little fewer, so that the last one has enough.

    Example:
        >>> [count >> 20 for _, count in pieces(7, (1 << 30) + 5)]
        [512, 512]
    """
    n_parts = -(-nbytes // MOST_COPY_BYTES)
    ends = [start + nbytes * n // n_parts for n in range(n_parts + 1)]
    return [(first, end - first) for first, end in itertools.pairwise(ends)]


def joined(parts: list[_Part]) -> int | None:
    """Return the checksum of the parts one after the other; None where one of them is not known."""
    from awscrt.checksums import combine_crc64nvme

    crc = 0
    for part in parts:
        if part.crc is None:
            return None
        crc = combine_crc64nvme(crc, part.crc, part.nbytes)
    return crc


def _crc(content: bytearray) -> int:
    from awscrt.checksums import crc64nvme

    return int(crc64nvme(content))


def _base64(crc: int) -> str:
    return base64.b64encode(crc.to_bytes(8, "big")).decode()


def _number(stated: str) -> int:
    return int.from_bytes(base64.b64decode(stated), "big")
