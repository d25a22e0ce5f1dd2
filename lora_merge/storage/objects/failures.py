"""What went wrong in a store: errors of obstore and boto3 → one sentence each, without secrets.

Their messages repeat bodies and URLs of requests, which may hold signatures and names of keys: nothing of them is shown
except a status and the code that the store gave.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from urllib.parse import urlsplit

from lora_merge.errors import CheckpointError, WriteError
from lora_merge.storage import input_files
from lora_merge.storage.objects.settings import endpoint_of
from lora_merge.storage.objects.store import AlreadyThereError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_merge.storage.objects.urls import StoreScheme

_CODE = re.compile(r"(?:<Code>|\(code: )([A-Za-z]+)(?:</Code>|\))")
_STATUS = re.compile(r"status code: (\d{3})")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_RETRIES = re.compile(r"after (\d+) retries")

_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_NO_OBJECT = frozenset({"NoSuchKey", "404", "BlobNotFound"})
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "CredentialRetrievalError"}
    | {"SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError", "LoginRefreshRequired"}
)
"""Names of boto3's errors where a profile, a file or a sign-on gives no credentials."""

_EXPIRED = frozenset({"ExpiredToken", "TokenRefreshRequired"})
_REJECTED = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "AuthenticationFailed"})
_ELSEWHERE = frozenset(
    {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)

_NO_ANSWER = (
    "kind: Connect",
    "kind: Timeout",
    "dns error",
    "ConnectError",
    "Could not connect to the endpoint URL",
    "Connect timeout",
)
_SEARCHES = (
    "169.254.169.254",
    "metadata.google.internal",
    "MissingAccount",
    "token request",
    "session.get_credentials",  # of obstore's provider, where boto3 found none
)

_CREDENTIALS = {
    "s3": 'set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; for profiles and SSO: pip install "lora-merge[s3]"; for a public bucket set AWS_SKIP_SIGNATURE=true',
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run: gcloud auth application-default login",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN",
}
_KEYS = {
    "s3": "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile: the two belong together, and to the store that AWS_ENDPOINT_URL names",
    "gs": "check the account of GOOGLE_APPLICATION_CREDENTIALS, or log in again: gcloud auth application-default login",
    "az": "check AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN: they belong to the account AZURE_STORAGE_ACCOUNT_NAME",
}
_RENEWED = _KEYS | {
    "s3": "get new credentials (aws sso login, for example): AWS_SESSION_TOKEN or the profile's have expired"
}
_ENDPOINTS = {
    scheme: f"check the network, proxies and {variable}"
    for scheme, variable in (
        ("s3", "AWS_ENDPOINT_URL"),
        ("gs", "GOOGLE_BASE_URL"),
        ("az", "AZURE_STORAGE_ENDPOINT"),
    )
}
_CLOUDS = tuple(_ENDPOINTS)
_SPELLING = dict.fromkeys(_CLOUDS, "check the spelling and the endpoint; buckets are not created")
_REGIONS = {"s3": "set AWS_REGION to the region of the bucket"}
_RIGHTS = {
    "s3": "ask for s3:GetObject below this prefix, and for s3:ListBucket on its bucket",
    "gs": "ask for storage.objects.get and storage.objects.list (the role Storage Object Viewer)",
    "az": "ask for the role Storage Blob Data Reader, or for a SAS token with the rights r and l",
    "file": "check the permissions of the folder",
}
_WRITING_RIGHTS = {
    "s3": "ask for s3:PutObject and s3:DeleteObject below this prefix; an output and OUT.lora-merge-staging/ beside it need both",
    "gs": "ask for storage.objects.create and storage.objects.delete (the role Storage Object User), for the output and OUT.lora-merge-staging/",
    "az": "ask for the role Storage Blob Data Contributor, or for a SAS token with the rights r, l, c, w and d",
    "file": "check the permissions of the folder, and of the one that it is in",
}
_NAMES = {"s3": "Amazon S3", "gs": "Google Cloud Storage", "az": "Azure"}


@contextlib.contextmanager
def reading(text: str) -> Iterator[None]:
    """Turn errors of obstore and boto3 in the block into one sentence each.

    Args:
        text: the URL of what is read.

    Raises:
        ChangedError: the object has another version than the one that was asked for.
        CheckpointError: for every other error.
    """
    from obstore import exceptions

    try:
        yield
    except exceptions.PreconditionError:
        raise input_files.changed(text) from None
    except _kinds() as exc:
        what, hint = said(exc, text)
        # ``from None``: the original repeats whole requests.
        raise CheckpointError(text, "", what, hint=hint) from None


@contextlib.contextmanager
def writing(text: str) -> Iterator[None]:
    """Turn errors of obstore and boto3 in the block into one sentence each.

    Args:
        text: the URL of what is written.

    Raises:
        AlreadyThereError: it exists.
        WriteError: for every other error.
    """
    from obstore import exceptions

    try:
        yield
    except exceptions.AlreadyExistsError:
        raise AlreadyThereError(f"{text}: already exists") from None
    except _kinds() as exc:
        what, hint = said(exc, text, is_writing=True)
        raise WriteError(f"{text}: {what}", hint=hint) from None


def _kinds() -> tuple[type[Exception], ...]:
    """Return the classes of the libraries' errors; boto3's only where it was imported."""
    from obstore import exceptions

    found: list[type[Exception]] = [exceptions.BaseError, OSError, ValueError]
    botocore = sys.modules.get("botocore.exceptions")
    if botocore is not None:
        found += [botocore.BotoCoreError, botocore.ClientError]
    return tuple(found)


def code_of(exc: BaseException) -> str:
    """Return the code that a store gave (``NoSuchKey``), of an error of obstore or boto3; empty where it gave none."""
    response = getattr(exc, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return next(iter(_CODE.findall(str(exc))), "")


def _status_of(exc: BaseException) -> str:
    response = getattr(exc, "response", None)
    if isinstance(response, dict):
        return str(response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    return next(iter(_STATUS.findall(str(exc))), "")


@dataclass(frozen=True, slots=True)
class _Answer:
    """What an error of a library tells."""

    error: BaseException
    message: str
    code: str
    """As the body of the answer has it (``NoSuchKey``); empty where there is none."""

    status: str


def _lacks_credentials(answer: _Answer) -> bool:
    return type(answer.error).__name__ in _NO_CREDENTIALS or is_credentials_search(answer.message)


def _is_redirected(answer: _Answer) -> bool:
    return answer.code in _ELSEWHERE or "incorrectly configured region" in answer.message


def _is_rejected(answer: _Answer) -> bool:
    return answer.code in _REJECTED or answer.status == "401"


def _is_denied(answer: _Answer) -> bool:
    # A request that deletes several objects is answered with 200, and the code of each.
    return (
        isinstance(answer.error, PermissionError) or answer.status == "403" or answer.code == "AccessDenied"
    )


_CASES: tuple[tuple[Callable[[_Answer], bool], str, Mapping[str, str]], ...] = (
    (lambda answer: answer.code in _NO_BUCKET, "there is no bucket {bucket}", _SPELLING),
    (
        lambda answer: isinstance(answer.error, FileNotFoundError) or answer.code in _NO_OBJECT,
        "does not exist",
        {},
    ),
    (_lacks_credentials, "no credentials were found", _CREDENTIALS),
    (lambda answer: answer.code in _EXPIRED, "the credentials have expired ({answer})", _RENEWED),
    (_is_rejected, "the store does not accept the credentials ({answer})", _KEYS),
    (_is_redirected, "the bucket {bucket} is in another region", _REGIONS),
    (_is_denied, "access denied{by} ({answer})", _RIGHTS),
    (lambda answer: is_unreachable(answer.message), "the store cannot be reached", _ENDPOINTS),
)
"""The first that holds is the reason: whether it holds, the end of a sentence, and the hint of each scheme."""


def said(exc: BaseException, text: str, *, is_writing: bool = False) -> tuple[str, str]:
    """Return what an error of obstore or boto3 means, as the end of a sentence about a URL, and what to do about it.

    Args:
        exc: the error.
        text: the URL.
        is_writing: it was to be written.
    """
    scheme, _, rest = text.partition("://")
    message = str(exc)
    code = code_of(exc)
    answer = _Answer(exc, message, code, _status_of(exc))
    for holds, what, hints in _CASES:
        if holds(answer):
            told = code or answer.status or type(exc).__name__
            rights = _WRITING_RIGHTS if is_writing and hints is _RIGHTS else hints
            words = what.format(bucket=rest.partition("/")[0], answer=told, by=_by(scheme))
            return words, rights.get(scheme, "")
    return _other(answer)


def _by(scheme: str) -> str:
    """Return which store answered: the host of the endpoint that the environment names, else the cloud."""
    # Behind an @: user and password may come before it.
    host = urlsplit(endpoint_of(cast("StoreScheme", scheme))).netloc.rpartition("@")[2]
    name = host or _NAMES.get(scheme, "")
    return f" by {name}" if name else ""


def is_unreachable(message: str) -> bool:
    """Return True for the message of an error where no server answered."""
    return any(mark in message for mark in _NO_ANSWER)


def is_credentials_search(message: str) -> bool:
    """Return True for the message of an error from the search for credentials: the service of cloud machines that hands
    them out refuses, or there is no account.
    """
    return any(mark in message for mark in _SEARCHES)


def _other(answer: _Answer) -> tuple[str, str]:
    if answer.code or answer.status:
        tries = next(iter(_RETRIES.findall(answer.message)), "")
        after = f", after {tries} retries" if tries else ""
        return f"the store answered {answer.code or answer.status}{after}", "try again later"
    if number := next(iter(_OS_ERROR.findall(answer.message)), ""):
        return f"failed ({os.strerror(int(number))})", "check the path and its permissions"
    # Queries of URLs may be signatures.
    first = re.sub(r"\?\S*", "", answer.message.partition("\n")[0])[:160]
    return f"failed ({first})", "run again"
