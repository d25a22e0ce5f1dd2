"""A folder in S3 through boto3, where it is installed: parts with checksums, and copies that the store makes by itself.

Reads and small files go through obstore, as everywhere.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_merge.storage.objects import s3_client
from lora_merge.storage.objects.buckets import BucketStore
from lora_merge.storage.objects.failures import reading, writing
from lora_merge.storage.objects.s3_upload import ALGORITHM, CopyingUpload
from lora_merge.storage.objects.settings import PROBE, settings_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from lora_merge.storage.objects.store import FileSink

_CHECKSUMS: dict[tuple[str, frozenset[tuple[str, str]]], bool] = {}
"""Bucket and settings → whether its store states checksums. Asked once in a process."""


class S3Store(BucketStore):
    """A folder in S3 (a `Store`).

    Args:
        url: where it is.

    Raises:
        PackageError: obstore is not installed, or cannot be used.
        CheckpointError: the store cannot be reached.
    """

    @property
    def can_copy(self) -> bool:
        """Whether the store states checksums (CRC64NVME); asked once by beginning an upload, and aborting it.

        Without a checksum, no check could tell whether the store copied the right bytes.

        Raises:
            CheckpointError: the store cannot be reached.
        """
        key = (self.url.bucket, settings_of("s3"))
        if key not in _CHECKSUMS:
            _CHECKSUMS[key] = self._states_checksums()
        return _CHECKSUMS[key]

    @contextlib.contextmanager
    def file(self, name: str, nbytes: int) -> Iterator[FileSink]:
        """Write a large file in the block; an exception in it aborts the upload.

        Raises:
            WriteError: it cannot be written, or is not what was sent.
        """
        # A store that states no checksums may refuse to be sent any, so obstore writes into it.
        if not self.can_copy:
            with super().file(name, nbytes) as plain:
                yield plain
            return
        text = self.url.child(name)
        with writing(text):
            upload = CopyingUpload(s3_client.client(), self.url, name, nbytes)
        try:
            yield upload
            with writing(text):
                upload.finish()
        except BaseException:
            upload.abort()
            raise

    def abort_uploads(self, names: Collection[str]) -> int:
        """Abort what killed processes left of uploads of these files: parts that no listing shows and that are billed.

        Raises:
            WriteError: the store refuses it.
        """
        wanted = {f"{self.url.prefix}/{name}" for name in (*names, PROBE)}
        client, where = s3_client.client(), {"Bucket": self.url.bucket}
        n_aborted = 0
        with writing(str(self.url)):
            pages = client.get_paginator("list_multipart_uploads").paginate(
                **where, Prefix=f"{self.url.prefix}/"
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", ())):
                if upload["Key"] in wanted:
                    client.abort_multipart_upload(**where, Key=upload["Key"], UploadId=upload["UploadId"])
                    n_aborted += 1
        return n_aborted

    def _states_checksums(self) -> bool:
        from botocore.exceptions import ClientError

        place = {"Bucket": self.url.bucket, "Key": f"{self.url.prefix}/{PROBE}"}
        with reading(str(self.url)):
            try:
                begun = s3_client.client().create_multipart_upload(
                    **place, ChecksumAlgorithm=ALGORITHM, ChecksumType="FULL_OBJECT"
                )
            except ClientError:
                return False
            # Another process may have taken it for one that a killed process left, and aborted it.
            with contextlib.suppress(ClientError):
                s3_client.client().abort_multipart_upload(**place, UploadId=begun["UploadId"])
        # A store that does not know the algorithm may ignore it, and then does not repeat it.
        return bool(begun.get("ChecksumAlgorithm") == ALGORITHM)
