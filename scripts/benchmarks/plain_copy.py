"""Copy a folder of a bucket into another one, as plainly as a library can: ``plain_copy.py obstore|boto3 FROM TO``.

Everything travels through this process, in parts of the size that lora-merge makes, as many under way as it has.
"""

from __future__ import annotations

import sys

from lora_merge.storage.objects import StoreUrl, parse_store_url, s3_client
from lora_merge.storage.objects.connecting import bucket_of
from lora_merge.storage.objects.parts import PARTS_UNDER_WAY, part_bytes
from lora_merge.storage.ranged import BLOCK_BYTES


def by_obstore(source: StoreUrl, target: StoreUrl) -> None:
    """Copy through obstore: one request for each object, and its writer."""
    import obstore

    bucket, start = bucket_of(source), len(source.prefix) + 1
    for meta in (meta for batch in obstore.list(bucket, prefix=source.prefix) for meta in batch):
        key, size = f"{target.prefix}/{meta['path'][start:]}", part_bytes(meta["size"])
        blocks = obstore.get(bucket, meta["path"]).stream(min_chunk_size=BLOCK_BYTES)
        with obstore.open_writer(bucket, key, buffer_size=size, max_concurrency=PARTS_UNDER_WAY) as writer:
            for block in blocks:
                writer.write(block)


def by_boto3(source: StoreUrl, target: StoreUrl) -> None:
    """Copy through boto3: the body of each object is handed to its own transfers."""
    from boto3.s3.transfer import TransferConfig

    client, start = s3_client.client(), len(source.prefix) + 1
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=source.bucket, Prefix=f"{source.prefix}/")
    for one in (one for page in pages for one in page["Contents"]):
        size = part_bytes(one["Size"])
        config = TransferConfig(size, max_concurrency=PARTS_UNDER_WAY, multipart_chunksize=size)
        body = client.get_object(Bucket=source.bucket, Key=one["Key"])["Body"]
        key = f"{target.prefix}/{one['Key'][start:]}"
        client.upload_fileobj(body, target.bucket, key, Config=config)


LIBRARIES = {"obstore": by_obstore, "boto3": by_boto3}


def main(library: str, source: str, target: str) -> None:
    urls = parse_store_url(source), parse_store_url(target)
    if urls[0] is None or urls[1] is None:
        sys.exit("FROM and TO are URLs of folders")
    LIBRARIES[library](urls[0], urls[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
