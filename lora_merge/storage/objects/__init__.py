"""Object stores: URL → `Store`. The package obstore is imported when the first one is made."""

from __future__ import annotations

from lora_merge.storage.objects import s3_client
from lora_merge.storage.objects.buckets import BucketStore
from lora_merge.storage.objects.store import AlreadyThereError, Entry, FileSink, Receipt, Store
from lora_merge.storage.objects.urls import StoreUrl, parse_store_url

__all__ = [
    "AlreadyThereError",
    "Entry",
    "FileSink",
    "Receipt",
    "Store",
    "StoreUrl",
    "parse_store_url",
    "store_at",
]


def store_at(url: StoreUrl) -> Store:
    """Return the store of a URL. Connections are kept, one for each bucket and process.

    Raises:
        PackageError: the package obstore is not installed; the hint says how to install it.
        ResolveError: the environment has no usable settings for it.
    """
    if url.scheme == "s3" and s3_client.is_installed():
        from lora_merge.storage.objects.s3_store import S3Store

        return S3Store(url)
    return BucketStore(url)
