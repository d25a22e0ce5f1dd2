"""What a store does wrong is healed, or told in one sentence; nothing wrong is kept, and no secret is shown."""

from __future__ import annotations

import os
import pickle
import socket
import time
import traceback
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import obstore
import pytest

from lora_merge import api
from lora_merge.errors import CheckpointError, LoraMergeError, WriteError
from lora_merge.storage.objects import StoreUrl, connecting, settings, store_at
from lora_merge.storage.objects.failures import writing
from lora_merge.storage.objects.s3_client import is_installed
from lora_merge.storage.reading import read_into
from lora_merge.storage.sources import open_source
from lora_merge.storage.store_staging import beside
from tests.stores.conftest import BUCKET, KEY_ID, SECRET, environment_of
from tests.stores.faulty import Faults, failing
from tests.stores.test_buckets import MIB, break_off, pattern

pytestmark = pytest.mark.loopback


@pytest.fixture(params=["boto3", "obstore"])
def writer(request, monkeypatch):
    """Write with each of the two libraries."""
    if request.param == "obstore":
        monkeypatch.setattr("lora_merge.storage.objects.s3_client.is_installed", lambda: False)
        monkeypatch.setenv("AWS_TESTED_WITHOUT", "boto3")
    assert is_installed()
    return request.param


@pytest.fixture
def behind(moto_endpoint, moto, monkeypatch):
    """Return a function that puts faults between this process and moto, and returns a store."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def go(faults, url=None):
            endpoint = stack.enter_context(failing(moto_endpoint, faults))
            for name, value in environment_of(endpoint).items():
                monkeypatch.setenv(name, value)
            return store_at(url or StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}"))

        yield go


def write(store, name, content, block_bytes=3 * MIB):
    with store.file(name, len(content)) as sink:
        for at in range(0, len(content), block_bytes):
            sink.write(memoryview(content)[at : at + block_bytes])
    return sink.receipt


def read(store, name, request_bytes=3 * MIB):
    found = bytearray()
    with open_source(store.url.child(name)) as source:
        for at in range(0, source.nbytes, request_bytes):
            source.ahead(at, request_bytes)
            buffer = bytearray(min(request_bytes, source.nbytes - at))
            read_into(source, memoryview(buffer), at)
            found += buffer
    return bytes(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_cut_bodies_busy_answers_and_lost_connections_are_healed(behind, writer, seed):
    faults = Faults(seed, busy=0.15, dropped=0.1, lost=0.1, cut=0.3)
    store, content = behind(faults), pattern(35 * MIB + 7, seed)
    write(store, "x.safetensors", content)
    assert read(store, "x.safetensors") == content
    assert store.get("x.safetensors") == content
    assert set(store.entries()) == {"x.safetensors"}
    assert faults.happened.total() >= 3


def test_a_lost_answer_to_the_last_request_of_an_upload_is_no_failure(behind, monkeypatch):
    faults = Faults()
    store, content = behind(faults), pattern(20 * MIB)
    from lora_merge.storage.objects.s3_upload import CopyingUpload

    complete = CopyingUpload._complete

    def lose(upload):
        faults.lost = 1.0
        monkeypatch.setattr(
            faults, "strikes", lambda kind, seen=[]: kind == "lost" and not seen and not seen.append(1)
        )
        return complete(upload)

    monkeypatch.setattr(CopyingUpload, "_complete", lose)
    receipt = write(store, "x", content)
    assert receipt.version == store.entry("x").version
    assert store.get("x") == content


def test_bytes_that_are_damaged_on_their_way_are_an_error_and_no_file_stays(behind):
    faults = Faults(damaged=1.0)
    store = behind(faults)
    # moto does not compare what it gets; it states what it has.
    with pytest.raises(
        WriteError, match=r"/x: the store has other bytes than were sent, so the file was deleted"
    ):
        write(store, "x", pattern(40 * MIB))
    assert store.entries() == {}


@pytest.mark.slow
def test_a_part_that_arrives_damaged_is_sent_again(seaweed_endpoint, seaweed, monkeypatch):
    faults = Faults(damaged=1.0, most=2)
    with failing(seaweed_endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store, content = store_at(StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}")), pattern(70 * MIB)
        receipt = write(store, "x", content)
        assert faults.happened["damaged"] == 2
        faults.most = 1 << 30
        with pytest.raises(WriteError, match=r"/y: the store answered \w+"):
            write(store, "y", content)
    assert receipt.checksum.startswith("crc64nvme:")
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed_endpoint)
    store = store_at(store.url)
    assert read(store, "x") == content
    assert set(store.entries()) == {"x"}
    assert not seaweed.list_multipart_uploads(Bucket=BUCKET, Prefix=store.url.prefix).get("Uploads")


def test_a_store_that_stays_busy_is_one_sentence(behind, writer, monkeypatch):
    monkeypatch.setattr("lora_merge.storage.objects.connecting.MAX_TRIES", 1)
    monkeypatch.setattr(settings, "MAX_TRIES", 1)
    monkeypatch.setattr("lora_merge.storage.objects.s3_client.MAX_TRIES", 1)
    store = behind(Faults(busy=1.0))
    with pytest.raises(CheckpointError, match=r"/x: the store answered SlowDown") as read_error:
        store.get("x")
    with pytest.raises(WriteError, match=r"/x: the store answered (SlowDown|503)") as write_error:
        write(store, "x", pattern(20 * MIB))
    assert read_error.value.hint == write_error.value.hint == "try again later"


@pytest.mark.parametrize(
    ("answer", "says", "hint"),
    [
        ((404, "NoSuchBucket"), "there is no bucket models", "check the spelling"),
        ((403, "AccessDenied"), "access denied by 127.0.0.1:", "ask for s3:"),
        ((403, "InvalidAccessKeyId"), "the store does not accept the credentials (InvalidAccessKeyId)", "check AWS_ACCESS_KEY_ID"),
        ((403, "SignatureDoesNotMatch"), "the store does not accept the credentials (SignatureDoesNotMatch)", "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ((400, "ExpiredToken"), "the credentials have expired (ExpiredToken)", "get new credentials"),
        ((301, "PermanentRedirect"), "the bucket models is in another region", "set AWS_REGION"),
        ((400, "AuthorizationHeaderMalformed"), "the bucket models is in another region", "set AWS_REGION"),
        ((400, "OddRequest"), "the store answered OddRequest", "try again"),
    ],
)  # fmt: skip
def test_a_refusal_is_one_sentence_without_secrets(behind, writer, answer, says, hint):
    store = behind(Faults(answer=answer))
    calls = {
        "list": store.entries,
        "get": lambda: store.get("x"),
        "put": lambda: store.put("x", b"1"),
        "file": lambda: write(store, "x", bytes(100)),
        "large file": lambda: write(store, "x", bytes(33 * MIB)),
    }
    for name, call in calls.items():
        with pytest.raises(LoraMergeError) as error:
            call()
        assert says in str(error.value), name
        assert error.value.hint.startswith(hint), name
        assert str(error.value).startswith("s3://models/t/")
        assert_no_secret(error.value)


def test_an_endpoint_that_never_answers_is_told_within_a_minute(moto, monkeypatch):
    # Connections are accepted by the kernel, and nothing reads from them.
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(connecting, "FIRST_SECONDS", 1)
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=r"s3://models/x: the store cannot be reached"):
            store_at(StoreUrl("s3", "models", "x"))
        assert time.monotonic() - start < 30


def test_an_endpoint_that_nobody_listens_at_is_told_within_seconds(writer, moto, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"s3://models/x: the store cannot be reached") as error:
        store_at(StoreUrl("s3", "models", "x"))
    assert "AWS_ENDPOINT_URL" in error.value.hint
    assert_no_secret(error.value)


def test_missing_credentials_and_profiles_are_told(moto, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(CheckpointError, match=r"s3://models/x: no credentials were found") as error:
        store_at(StoreUrl("s3", "models", "x"))
    assert "AWS_ACCESS_KEY_ID" in error.value.hint
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(CheckpointError, match=r"s3://models/x: no credentials were found") as error:
        store_at(StoreUrl("s3", "models", "x"))


def test_a_profile_gives_credentials_and_an_endpoint(moto_endpoint, moto, s3_url, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(
        f"[profile work]\nregion = us-east-1\nendpoint_url = {moto_endpoint}\n"
        f"aws_access_key_id = AKIAOFTHEPROFILE\naws_secret_access_key = {SECRET}\n"
    )
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "work")
    store = store_at(s3_url)
    store.put("x", b"1")
    write(store, "y", pattern(17 * MIB))
    assert set(store.entries()) == {"x", "y"}


def test_credentials_are_renewed_before_those_of_a_role_can_expire(moto):
    from lora_merge.storage.objects import connecting

    given = connecting._s3_options()["credential_provider"]()
    # boto3 gives none that expire in less than 10 minutes (botocore.credentials: _mandatory_refresh_timeout).
    assert given["expires_at"] - datetime.now(UTC) < timedelta(minutes=10)
    assert given["access_key_id"] == KEY_ID


def test_a_disk_that_refuses_is_told_with_the_systems_words(tmp_path):
    (tmp_path / "in the way").write_bytes(b"1")
    store = store_at(StoreUrl("file", "", f"{tmp_path}/in the way".lstrip("/")))
    with pytest.raises(WriteError, match=r"file:///.*/in the way/x: failed \(Not a directory\)"):
        store.put("x", b"1")
    with pytest.raises(WriteError, match=r"file:///.*/in the way/x: failed \(Not a directory\)"):
        write(store, "x", b"1")


def test_an_interrupt_in_the_block_leaves_no_upload(moto, s3_url, writer):
    with pytest.raises(ZeroDivisionError):
        break_off(store_at(s3_url), 70 * MIB, 50 * MIB)
    assert not moto.list_multipart_uploads(Bucket=BUCKET, Prefix=s3_url.prefix).get("Uploads")


def assert_no_secret(error: BaseException) -> None:
    shown = "".join(traceback.format_exception(error)) + error.hint
    for text in (shown, repr(pickle.dumps(error))):
        assert SECRET not in text
        assert "AKIATEST" not in text


@pytest.mark.parametrize("method", ["PUT", "POST"])  # objects of S3 are deleted by POST
def test_an_output_that_may_not_be_written_is_refused_before_anything_is_read(
    method, behind, writer, pico, pico_adapter
):
    class Deaf:
        def phase(self, name, total_bytes):
            pytest.fail(f"{name} began")

        advance = done = phase

    base = pico()
    store = behind(Faults(answer=(403, "AccessDenied"), answered=(method,)))
    with pytest.raises(WriteError) as error:
        api.merge(base=str(base), adapter=str(pico_adapter(base)), out=str(store.url), observer=Deaf())
    host = urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc
    assert str(error.value) == f"{store.url}: access denied by {host} (AccessDenied)"
    assert "s3:PutObject and s3:DeleteObject below this prefix" in error.value.hint
    assert_no_secret(error.value)


def test_an_object_that_may_not_be_deleted_is_told_by_its_code():
    # The words of obstore for one of the objects in the answer to DeleteObjects.
    text = "Generic S3 error: DeleteObjects request failed for key a/x: Access Denied (code: AccessDenied)"
    with pytest.raises(WriteError, match=r"access denied .*\(AccessDenied\)"), writing("s3://models/a"):
        raise obstore.exceptions.GenericError(text)


def test_a_probe_that_was_left_is_in_nobodys_way_and_goes(moto, s3_url, pico, pico_adapter):
    base = pico()
    for place in (s3_url, beside(s3_url)):
        store_at(place).put(settings.PROBE, b"")
    api.merge(base=str(base), adapter=str(pico_adapter(base)), out=str(s3_url))
    assert settings.PROBE not in store_at(s3_url).entries()
    assert not store_at(beside(s3_url)).entries()
