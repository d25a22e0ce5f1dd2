"""URLs of object stores: ``s3://bucket/prefix``, ``gs://…``, ``az://container/prefix`` and ``file:///path``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, cast

from lora_merge.errors import RequestError
from lora_merge.words import printable

StoreScheme = Literal["s3", "gs", "az", "file"]

SHAPES: Mapping[StoreScheme, str] = {
    "s3": "s3://BUCKET/PREFIX",
    "gs": "gs://BUCKET/PREFIX",
    "az": "az://CONTAINER/PREFIX",
    "file": "file:///PATH",
}
"""Scheme → what its URLs look like."""

OTHER_SCHEMES = (
    *("http", "https", "ftp", "hdfs", "oss", "r2", "s3a", "s3n", "gcs", "abfs", "abfss", "wasb", "wasbs"),
)
"""Of URLs that other programs read, and this one does not."""

_LIKE_URL = re.compile(
    rf"[a-z][a-z0-9+.-]+:/|({'|'.join(sorted({*SHAPES, *OTHER_SCHEMES}))})(:|//)", re.IGNORECASE
)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,221}")
"""Of all three clouds: GCS allows 222 characters in names with dots, the others 63."""


@dataclass(frozen=True, slots=True)
class StoreUrl:
    """A folder in a store, or one object in it. It holds no credentials, so it may travel and be printed."""

    scheme: StoreScheme

    bucket: str
    """Also called a container; empty for files."""

    prefix: str
    """Of the names below it, without slashes at its ends; of files the path without its first slash."""

    def __str__(self) -> str:
        """Return the text that parses to this URL."""
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    def child(self, name: str) -> str:
        """Return the text of an object below the prefix: what `TensorRef.file` has.

        Example:
            >>> StoreUrl("s3", "models", "llama").child("model.safetensors")
            's3://models/llama/model.safetensors'
        """
        return f"{self}/{name}"


def parse_store_url(text: str) -> StoreUrl | None:
    """Return the folder that a URL names; None for a text with another scheme, or without one.

    Raises:
        RequestError: the scheme is one of a store, and the rest is not a URL of it.

    Example:
        >>> parse_store_url("s3://models/llama/8b/")
        StoreUrl(scheme='s3', bucket='models', prefix='llama/8b')
        >>> parse_store_url("file:///data/base"), parse_store_url("hf://org/name"), parse_store_url("/data/base")
        (StoreUrl(scheme='file', bucket='', prefix='data/base'), None, None)
    """
    scheme, mark, rest = text.partition("://")
    if not mark or scheme not in SHAPES:
        return None
    bucket, _, path = rest.partition("/")
    # First: a sentence about anything else would repeat the secret.
    if "@" in bucket:
        _refuse(
            f"{scheme}://…@…", "has credentials in it", "set them in the environment, as docs/stores.md shows"
        )
    _refuse_query(text)
    prefix = path.strip("/")
    shape = SHAPES[cast("StoreScheme", scheme)]
    if scheme == "file":
        if bucket:
            _refuse(
                text,
                f"names the machine {bucket}, and files are read on this one only",
                f"write {shape}, with three slashes",
            )
    else:
        _check_bucket(text, bucket, shape)
    if not prefix:
        _refuse(
            text, "names a whole bucket" if bucket else "names no folder", f"name a folder in it: {shape}"
        )
    _check_prefix(text, prefix)
    return StoreUrl(cast("StoreScheme", scheme), bucket, prefix)


def _refuse_query(text: str) -> None:
    """Refuse a URL with a query. Signed URLs have their signature there: it is not repeated.

    Raises:
        RequestError: there is one.
    """
    shown, mark, _ = text.partition("?")
    if mark:
        hint = "leave it out: credentials come from the environment, and folders with ? in their name are not read"
        _refuse(shown, "has a query (?…)", hint)


def _check_bucket(text: str, bucket: str, shape: str) -> None:
    """Refuse what cannot be the name of a bucket.

    Raises:
        RequestError: it cannot be one.
    """
    if not bucket:
        _refuse(text, "has no bucket", f"write {shape}")
    if _BUCKET.fullmatch(bucket):
        return
    wanted = "expected at least 3 letters, digits, dots, - or _"
    hint = f"write {shape}"
    if ":" in bucket:
        hint += ", and name another server in the environment, as docs/stores.md shows"
    _refuse(text, f"{printable(bucket)} is not the name of a bucket, {wanted}", hint)


def is_store_url(text: str) -> bool:
    """Return True for a text with the scheme of a store, whether the rest is right or not.

    Example:
        >>> is_store_url("s3://models"), is_store_url("s3:/models/llama")
        (True, False)
    """
    scheme, mark, _ = text.partition("://")
    return bool(mark) and scheme in SHAPES


def is_like_url(text: str) -> bool:
    """Return True for a text that is meant as a URL: with a scheme, or with one of a store and a slip of the pen.

    Example:
        >>> [is_like_url(text) for text in ("s3://models/a", "S3:/models/a", "gcs//a/b", "a/b", "./s3:a")]
        [True, True, True, False, False]
    """
    return _LIKE_URL.match(text) is not None


def path_here(text: str) -> Path | None:
    """Return the path on this machine that a path or a URL of ``file://`` means; None for another store.

    Example:
        >>> path_here("file:///data/base"), path_here("/data/base"), path_here("s3://models/base")
        (PosixPath('/data/base'), PosixPath('/data/base'), None)
    """
    url = parse_store_url(text)
    if url is None:
        return Path(text)
    return Path("/", url.prefix) if url.scheme == "file" else None


def _check_prefix(text: str, prefix: str) -> None:
    """Refuse what stores and clients read in different ways.

    Raises:
        RequestError: there is such a thing.
    """
    for step in prefix.split("/"):
        if step in {"", ".", ".."}:
            _refuse(text, f"has {step or 'an empty step'} in its path", "write the path without it")
    if "#" in prefix:
        _refuse(
            text, "has # in its path, which libraries of stores read in different ways", "rename the folder"
        )
    if not prefix.isprintable():
        _refuse(text, "has characters that cannot be printed", "rename the folder")


def _refuse(shown: str, what: str, hint: str) -> NoReturn:
    raise RequestError("", 0, "", f"{printable(shown)}: {what}", hint=hint)
