"""A folder in a store, on files of this machine and on a server of S3."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from lora_merge.errors import ChangedError, CheckpointError, PackageError, WriteError
from lora_merge.runtime import packages
from lora_merge.storage import input_files
from lora_merge.storage.objects import AlreadyThereError, StoreUrl, store_at
from lora_merge.storage.objects.parts import part_bytes
from lora_merge.storage.ranged import BLOCK_BYTES
from lora_merge.storage.reading import read_blocks, read_into
from lora_merge.storage.sources import open_source, version_at

MIB = 1 << 20


def pattern(nbytes, seed=0):
    """Return bytes that differ at every place of a block."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8).tobytes()


def break_off(store, nbytes, written):
    """Write a part of a file, and raise."""
    with store.file("x", nbytes) as sink:
        sink.write(memoryview(pattern(written)))
        raise ZeroDivisionError


def test_small_files_are_written_listed_read_and_deleted(store):
    assert store.entries() == {}
    entry = store.put("a/b.json", b"{}")
    store.put("c", b"xyz")
    assert store.get("a/b.json") == b"{}"
    assert {name: found.nbytes for name, found in store.entries().items()} == {"a/b.json": 2, "c": 3}
    assert store.entries()["a/b.json"] == store.entry("a/b.json") == entry
    store.delete(["c", "not there"])
    assert set(store.entries()) == {"a/b.json"}
    assert store.entry("c") is None


def test_a_neighbour_with_the_same_beginning_is_not_listed(url, store):
    store_at(StoreUrl(url.scheme, url.bucket, f"{url.prefix}.lora-merge-staging")).put("run.json", b"1")
    store.put("x", b"1")
    assert set(store.entries()) == {"x"}


def test_a_file_is_created_once(url, store):
    store.put("run.json", b"mine", create=True)
    with pytest.raises(AlreadyThereError, match=r"run\.json: already exists"):
        store.put("run.json", b"yours", create=True)
    assert store.get("run.json") == b"mine"
    assert store.put("run.json", b"other").version == store.entry("run.json").version


def test_names_that_stores_treat_specially_are_kept(store):
    names = ["a b", "a%20b", "ü", "q[1]", "x=1&y", "a+b", "~"]
    for name in names:
        store.put(name, name.encode())
    assert set(store.entries()) == set(names)
    assert all(store.get(name) == name.encode() for name in names)


def test_a_missing_file_is_named(url, store):
    store.put("x", b"1")
    with pytest.raises(CheckpointError, match=r"/nope: does not exist"):
        store.get("nope")
    with pytest.raises(CheckpointError, match=r"/nope: does not exist"), store.source("nope"):
        pass
    with pytest.raises(FileNotFoundError):
        version_at(url.child("nope"))


@pytest.mark.parametrize("nbytes", [0, 1, 16 * MIB, 16 * MIB + 1, 37 * MIB + 5])
def test_a_file_of_several_parts_arrives_whole_although_its_buffer_is_reused(url, store, nbytes):
    content = pattern(nbytes)
    block = bytearray(3 * MIB)
    with store.file("w/model.safetensors", nbytes) as sink:
        for at in range(0, nbytes, len(block)):
            part = content[at : at + len(block)]
            block[: len(part)] = part
            sink.write(memoryview(block)[: len(part)])
            block[:] = bytes(len(block))
    entry = store.entry("w/model.safetensors")
    assert (
        (sink.receipt.nbytes, sink.receipt.version)
        == (entry.nbytes, entry.version)
        == (nbytes, entry.version)
    )
    assert store.get("w/model.safetensors") == content


def test_a_block_that_raises_leaves_no_file(store):
    with pytest.raises(ZeroDivisionError):
        break_off(store, 40 * MIB, 20 * MIB)
    assert store.entries() == {}


@pytest.mark.parametrize(("announced", "written"), [(10, 9), (10, 11), (20 * MIB, 17 * MIB)])
def test_a_file_of_another_size_than_announced_is_refused(store, announced, written):
    with (
        pytest.raises(WriteError, match=f"{written} bytes were written, expected {announced}"),
        store.file("x", announced) as sink,
    ):
        sink.write(memoryview(bytes(written)))
    assert store.entries() == {}


@pytest.mark.loopback
def test_an_aborted_upload_leaves_no_parts_in_the_bucket(moto, s3_url):
    with pytest.raises(ZeroDivisionError):
        break_off(store_at(s3_url), 60 * MIB, 40 * MIB)
    assert "Uploads" not in moto.list_multipart_uploads(Bucket=s3_url.bucket, Prefix=s3_url.prefix)


def test_a_source_is_read_by_ranges(url, store):
    content = pattern(2 * MIB + 100)
    store.put("x.safetensors", content)
    with open_source(url.child("x.safetensors")) as source:
        assert (source.nbytes, source.fd, source.text) == (len(content), None, url.child("x.safetensors"))
        assert source.version == version_at(url.child("x.safetensors"))
        for start, nbytes in [(0, 8), (8, 1000), (5, 2 * MIB), (len(content) - 3, 3)]:
            buffer = bytearray(nbytes)
            read_into(source, memoryview(buffer), start)
            assert buffer == content[start : start + nbytes]
        assert source.read_into(memoryview(bytearray(10)), len(content)) == 0
        with pytest.raises(CheckpointError, match="ends at byte"):
            read_into(source, memoryview(bytearray(10)), len(content) - 5)


def test_a_source_is_read_ahead(url, store):
    content = pattern(5 * BLOCK_BYTES + 12345)
    with store.file("x", len(content)) as sink:
        sink.write(memoryview(content))
    with open_source(url.child("x")) as source:
        found = b"".join(bytes(block) for block in read_blocks(source, 777, len(content) - 777))
        assert found == content[777:]
        # Announced, then skipped: what is read next must not wait for it, nor be wrong.
        source.ahead(0, 5 * BLOCK_BYTES)
        for start in (3 * BLOCK_BYTES + 5, 10, 4 * BLOCK_BYTES, BLOCK_BYTES - 7):
            buffer = bytearray(100_000)
            read_into(source, memoryview(buffer), start)
            assert buffer == content[start : start + len(buffer)]


def test_an_object_that_changes_while_it_is_read_is_an_error(url, store):
    store.put("x", pattern(2 * MIB, 1))
    with open_source(url.child("x")) as source:
        read_into(source, memoryview(bytearray(100)), 0)
        store.put("x", pattern(2 * MIB, 2))
        with pytest.raises(ChangedError, match=r"/x: changed while it was read"):
            read_into(source, memoryview(bytearray(100)), MIB)


def test_an_object_that_changes_between_two_openings_is_an_error(url, store):
    store.put("x", b"1" * 100)
    with input_files.watching():
        with open_source(url.child("x")):
            pass
        store.put("x", b"2" * 100)
        changed = pytest.raises(ChangedError, match=r"/x: changed while it was read")
        # The first version is known, so it is demanded by the first read.
        with changed, open_source(url.child("x")) as source:
            read_into(source, memoryview(bytearray(10)), 0)


def test_a_store_is_not_pickled(store):
    with pytest.raises(TypeError, match="holds credentials"):
        pickle.dumps(store)


@pytest.mark.parametrize("nbytes", [1, 16 * MIB, 5 << 30, 140 << 30, 1 << 40, 5 << 40])
def test_parts_are_equal_and_few(nbytes):
    part = part_bytes(nbytes)
    assert part % MIB == 0
    assert part >= 16 * MIB
    assert -(-nbytes // part) <= 9000


def test_without_the_package_a_url_is_one_sentence(url, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setattr(packages, "_USABLE", {})
    with pytest.raises(
        PackageError, match=f"{url.scheme}:// needs the package obstore, which is not installed"
    ) as error:
        store_at(url)
    assert error.value.hint == 'pip install "lora-merge[objects]"'


def test_nothing_is_imported_before_a_url_is_used():
    code = "import sys, lora_merge.cli.process, lora_merge.storage.sources; print({'obstore', 'boto3', 'botocore'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
