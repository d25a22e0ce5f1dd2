"""Bytes that the store copies by itself: they never come here, and the file is what it would have been."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from uuid import uuid4

import pytest

from lora_merge.errors import ChangedError, WriteError
from lora_merge.storage.objects import StoreUrl, store_at
from lora_merge.storage.objects.s3_upload import LEAST_PART_BYTES, MOST_COPY_BYTES, CopyingUpload, pieces
from tests.stores.conftest import BUCKET
from tests.stores.faulty import Faults, failing
from tests.stores.test_buckets import MIB, pattern

pytestmark = pytest.mark.loopback


@pytest.fixture(params=["s3_url", pytest.param("seaweed_url", marks=pytest.mark.slow)])
def s3(request):
    """Return a folder of moto, which states no checksum of parts, and of SeaweedFS, which does."""
    return store_at(request.getfixturevalue(request.param))


def crc(content):
    from awscrt.checksums import crc64nvme

    return f"crc64nvme:{crc64nvme(bytes(content)):016x}"


def compose(store, name, steps, sources):
    """Write a file of texts and of ranges of sources; return its bytes, and which ranges the store copied."""
    content = b"".join(
        step if isinstance(step, bytes) else sources[step[0]][step[1] : step[1] + step[2]] for step in steps
    )
    copied = []
    with store.file(name, len(content)) as sink:
        for step in steps:
            if isinstance(step, bytes):
                sink.write(memoryview(step))
                continue
            source, start, nbytes = step
            copied.append(sink.copy(store.url.child(source), start, nbytes))
            if not copied[-1]:
                sink.write(memoryview(sources[source])[start : start + nbytes])
    return content, copied, sink.receipt


def test_runs_of_a_part_or_more_are_copied_and_the_file_is_the_same(s3):
    sources = {"base.safetensors": pattern(64 * MIB, 1), "b": pattern(12 * MIB, 2)}
    for name, content in sources.items():
        s3.put(name, content)
    assert s3.can_copy
    base = "base.safetensors"
    steps = [
        b"header" * 100, (base, 3 * MIB + 1, 20 * MIB), b"merged", (base, 30 * MIB, 4 * MIB), (base, 34 * MIB, 30 * MIB),
        ("b", 0, 12 * MIB), pattern(17 * MIB, 3), (base, 0, 5 * MIB), b"end",
    ]  # fmt: skip
    content, copied, receipt = compose(s3, "out", steps, sources)
    assert copied == [True, False, True, True, False]
    assert s3.get("out") == content
    assert receipt.version == s3.entry("out").version
    assert receipt.checksum == crc(content)


@pytest.mark.parametrize("seed", range(6))
def test_random_files_are_the_same_however_their_runs_fall(s3, seed):
    import random

    chosen = random.Random(seed)
    sources = {"a": pattern(40 * MIB, seed)}
    s3.put("a", sources["a"])
    steps = []
    for _ in range(chosen.randrange(1, 9)):
        nbytes = chosen.choice(
            [1, 1000, LEAST_PART_BYTES - 1, LEAST_PART_BYTES, 2 * LEAST_PART_BYTES, 16 * MIB, 23 * MIB]
        )
        start = chosen.randrange(40 * MIB - nbytes)
        steps.append(("a", start, nbytes) if chosen.random() < 0.7 else sources["a"][start : start + nbytes])
    content, _, receipt = compose(s3, "out", steps, sources)
    assert s3.get("out") == content
    assert receipt.checksum in {crc(content), ""}


def test_a_whole_file_is_copied_without_reading_it(moto_endpoint, moto, monkeypatch):
    faults = Faults()
    with failing(moto_endpoint, faults) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store = store_at(StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}"))
        content = pattern(60 * MIB)
        store.put("base", content)
        faults.sent_bytes, faults.requests = 0, Counter()
        with store.file("out", len(content)) as sink:
            assert sink.copy(store.url.child("base"), 0, len(content))
        assert faults.sent_bytes < 2000
        assert faults.requests["GET"] == 0
        assert store.get("out") == content


def test_what_another_storage_has_is_not_copied(s3, tmp_path):
    (tmp_path / "x").write_bytes(pattern(20 * MIB))
    s3.put("other", b"1")
    with s3.file("out", 20 * MIB) as sink:
        assert not sink.copy(str(tmp_path / "x"), 0, 20 * MIB)
        assert not sink.copy(f"file://{tmp_path}/x", 0, 20 * MIB)
        assert not sink.copy(s3.url.child("other"), 0, LEAST_PART_BYTES - 1)
        sink.write(memoryview(bytes(20 * MIB)))
    assert s3.get("out") == bytes(20 * MIB)


@pytest.mark.slow
def test_an_object_that_changes_between_two_copies_is_an_error(seaweed_url):
    store = store_at(seaweed_url)
    store.put("base", pattern(30 * MIB, 1))
    with pytest.raises(ChangedError, match=r"/base: changed while it was read"):
        change_between(store)
    assert set(store.entries()) == {"base"}


def change_between(store):
    with store.file("out", 24 * MIB) as sink:
        assert sink.copy(store.url.child("base"), 0, 8 * MIB)
        store.put("base", pattern(30 * MIB, 2))
        assert sink.copy(store.url.child("base"), 8 * MIB, 16 * MIB)


def test_a_store_that_puts_other_bytes_together_is_found_out(s3, monkeypatch):
    content = pattern(40 * MIB)
    complete = CopyingUpload._complete

    # As if a part had been another one: the store's checksum is not what its parts have together.
    monkeypatch.setattr(CopyingUpload, "_complete", lambda upload: complete(upload) ^ 1)
    with (
        pytest.raises(WriteError, match="the store has other bytes than were sent, so the file was deleted"),
        s3.file("x", len(content)) as sink,
    ):
        sink.write(memoryview(content))
    assert s3.entries() == {}


def test_uploads_that_killed_processes_left_are_aborted_by_name(s3):
    from lora_merge.storage.objects import s3_client

    client, prefix = s3_client.client(), s3.url.prefix
    for name in ("a.safetensors", "b.safetensors"):
        client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/{name}")

    def left():
        found = client.list_multipart_uploads(Bucket=BUCKET, Prefix=f"{prefix}/").get("Uploads", [])
        return {upload["Key"].removeprefix(f"{prefix}/") for upload in found}

    assert s3.abort_uploads(["a.safetensors", "c.safetensors"]) == 1
    assert left() == {"b.safetensors"}
    assert s3.abort_uploads(["b.safetensors"]) == 1
    assert left() == set()
    client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/.lora-merge-probe")
    assert s3.abort_uploads(["b.safetensors"]) == 1, "of a killed process that asked for checksums"
    assert left() == set()


def test_a_store_without_checksums_does_not_copy_and_is_written_all_the_same(
    moto_endpoint, moto, monkeypatch
):
    with failing(moto_endpoint, Faults(no_checksums=True)) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        store, content = store_at(StoreUrl("s3", BUCKET, f"t/{uuid4().hex[:12]}")), pattern(40 * MIB)
        assert not store.can_copy
        store.put("base", content)
        with store.file("out", len(content)) as sink:
            assert not sink.copy(store.url.child("base"), 0, len(content))
            sink.write(memoryview(content))
        assert store.get("out") == content
        assert sink.receipt.checksum == ""


@pytest.mark.parametrize(
    "nbytes", [LEAST_PART_BYTES, MOST_COPY_BYTES, MOST_COPY_BYTES + 1, 7 * MOST_COPY_BYTES + 12345]
)
def test_copies_are_cut_into_parts_that_s3_takes(nbytes):
    found = pieces(77, nbytes)
    assert found[0][0] == 77
    assert sum(count for _, count in found) == nbytes
    assert all(first[0] + first[1] == second[0] for first, second in pairwise(found))
    assert all(LEAST_PART_BYTES <= count <= MOST_COPY_BYTES for _, count in found)
