"""Transfers larger than one system call, across filesystems, and to disks that are full."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import xxhash

from lora_merge.core.shards import place
from lora_merge.core.tensor import TensorRef
from lora_merge.errors import CheckpointError, ResolveError, WriteError
from lora_merge.formats.safetensors import read_header, tensor_digest
from lora_merge.storage import local
from lora_merge.storage.copying import CopyTarget, copy_range
from lora_merge.storage.folder import Folder
from lora_merge.storage.output_files import reserve
from lora_merge.storage.reading import read_blocks, read_into
from lora_merge.storage.small_files import read_json
from lora_merge.storage.sources import open_source
from lora_merge.storage.user_paths import output_path, user_path
from lora_merge.storage.writing import Stream, write_from


@contextlib.contextmanager
def opened(path, flags=os.O_RDWR):
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def new(path):
    return opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)


@pytest.fixture
def sparse(tmp_path):
    """Return a file of 5 GB that takes no space: zeros, but for a mark near its end."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.seek(5_000_000_000 - 4)
        file.write(b"mark")
    return path


def test_bytes_beyond_four_gigabytes_are_copied(sparse, tmp_path):
    target = tmp_path / "target"
    start = 4_990_000_001
    with open_source(sparse) as source, new(target) as fd:
        digest = copy_range(source, start, 5_000_000_000 - start, fd, 0, "target")

    content = target.read_bytes()
    assert content == bytes(9_999_995) + b"mark"
    assert digest == f"xxh3_128:{xxhash.xxh3_128_hexdigest(content)}"


def test_reads_and_writes_are_cut_into_calls_that_the_kernel_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MAX_TRANSFER_BYTES", 7)
    data = bytes(range(256))
    with new(tmp_path / "file") as fd:
        write_from(fd, memoryview(data), 3, "file")
    buffer = bytearray(256)
    with open_source(tmp_path / "file") as source:
        read_into(source, memoryview(buffer), 3)

    assert bytes(buffer) == data


@pytest.mark.parametrize("nbytes", [0, 1, 3_000_000, (4 << 20) + 1])
def test_a_copy_is_whole_and_its_digest_is_that_of_its_bytes(nbytes, tmp_path):
    data = os.urandom(nbytes)
    (tmp_path / "source").write_bytes(b"before" + data + b"after")
    (tmp_path / "target").write_bytes(b"." * (nbytes + 20))
    with open_source(tmp_path / "source") as source, opened(tmp_path / "target") as fd:
        digest = copy_range(source, 6, nbytes, fd, 9, "target")
    assert (tmp_path / "target").read_bytes() == b"." * 9 + data + b"." * 11
    assert digest == f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}"


@pytest.mark.parametrize("start", [0, 8, 4095, 4096, 10_000])
@pytest.mark.parametrize(
    "sizes", [[], [0], [1, 1], [5000, 3, 4093, 1, 20_000], [4096] * 3, [100_000]], ids=str
)
@pytest.mark.parametrize("uncached", [True, False], ids=["as the kernel can", "as older kernels do"])
def test_a_stream_writes_its_range_and_nothing_else(start, sizes, uncached, tmp_path, monkeypatch):
    written, pwritev = [], os.pwritev

    def write(fd, buffers, offset, flags=0):
        if flags and not uncached:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        count = sum(map(len, buffers))
        written.append((offset, count))
        return pwritev(
            fd, [bytes(part)[: 1 + count // 2] for part in buffers[:1]], offset
        )  # short, as it may be

    data = os.urandom(sum(sizes))
    (tmp_path / "file").write_bytes(b"." * (start + len(data) + 50))
    monkeypatch.setattr(os, "pwritev", write)
    with opened(tmp_path / "file") as fd:
        stream, at = Stream(fd, start, "file"), 0
        for size in sizes:
            stream.write(memoryview(data)[at : at + size])
            at += size
        stream.finish()
    assert (tmp_path / "file").read_bytes() == b"." * start + data + b"." * 50
    assert bool(written) == bool(data)


def test_a_stream_sends_whole_pages(tmp_path, monkeypatch):
    ends, pwritev = [], os.pwritev

    def write(fd, buffers, offset, *flags):
        n_written = pwritev(fd, buffers, offset)
        ends.append(offset + n_written)
        return n_written

    monkeypatch.setattr(os, "pwritev", write)
    with new(tmp_path / "file") as fd:
        stream = Stream(fd, 100, "file")
        for size in (5000, 70_000, 8192, 333):
            stream.write(memoryview(bytes(size)))
        assert all(end % 4096 == 0 for end in ends)
        assert len(ends) == 3
        stream.finish()
    assert ends[-1] == 100 + 5000 + 70_000 + 8192 + 333


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_stream_onto_a_full_disk_is_a_write_error():
    with opened("/dev/full") as fd, pytest.raises(WriteError, match="no space left"):
        Stream(fd, 0, "/dev/full").write(memoryview(bytes(10_000)))


@pytest.mark.parametrize(("start", "target_start"), [(0, 0), (100, 100), (4096 + 7, 7), (8, 16), (0, 1)])
@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("block_bytes", [333, 4096, 50_000])
def test_blocks_are_shared_where_both_files_have_them_alike(
    start, target_start, able, block_bytes, tmp_path, monkeypatch
):
    """The request that a filesystem with shared blocks would carry out is carried out by hand."""
    import fcntl

    shared, written, pwritev = [], [], os.pwritev

    def write(fd, buffers, offset):
        written.extend(map(len, buffers))
        return pwritev(fd, buffers, offset)

    def ioctl(target_fd, request, argument):
        if not able:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        source_fd, offset, nbytes, target_offset = struct.unpack("=qQQQ", argument)
        assert offset % 4096 == nbytes % 4096 == target_offset % 4096 == 0
        shared.append(nbytes)
        os.pwrite(target_fd, os.pread(source_fd, nbytes, offset), target_offset)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(os, "pwritev", write)
    data = os.urandom(50_000)
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "target").write_bytes(bytes(60_000))
    with (
        open_source(tmp_path / "source") as source,
        opened(tmp_path / "target") as fd,
    ):
        target = CopyTarget(source, start, 40_000, fd, target_start, "target")
        written.clear()
        for block in read_blocks(source, start, 40_000, block_bytes):
            target.write(block)
    wanted = bytes(target_start) + data[start : start + 40_000]
    assert (tmp_path / "target").read_bytes() == wanted + bytes(60_000 - len(wanted))
    assert bool(shared) == (able and (start - target_start) % 4096 == 0)
    assert all(nbytes > 30_000 for nbytes in shared)
    assert sum(written) == 40_000 - sum(shared)


def test_a_source_that_shrinks_while_it_is_read_is_named(tmp_path):
    (tmp_path / "short").write_bytes(b"1234")
    with (
        open_source(tmp_path / "short") as source,
        pytest.raises(CheckpointError, match="ends at byte 4, expected 12 or more"),
    ):
        read_into(source, memoryview(bytearray(10)), 2)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_way_out():
    with (
        opened("/dev/full") as fd,
        pytest.raises(WriteError, match="no space left on the disk") as caught,
    ):
        write_from(fd, memoryview(b"data"), 0, "/dev/full")

    assert "another --out" in caught.value.hint


def test_a_file_is_reserved_at_full_size_with_its_header(tmp_path):
    refs = [TensorRef("a", "BF16", (3, 5), "", 0, 30), TensorRef("ü", "F32", (), "", 0, 4)]
    planned = place("model.safetensors", refs, {"origin": "test"})
    reserve(Folder.of(tmp_path), planned)

    found = read_header(tmp_path / "model.safetensors", "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size == planned.nbytes
    assert found.metadata == {"format": "pt", "origin": "test"}
    assert [(ref.name, ref.dtype, ref.shape, ref.start) for ref in found.tensors] == [
        (slot.name, slot.dtype, slot.shape, slot.start) for slot in planned.slots
    ]


def test_reserving_a_name_that_exists_is_an_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(WriteError, match="File exists"):
        reserve(Folder.of(tmp_path), place("taken", [], {}))


def test_the_digest_of_a_tensor_is_that_of_its_bytes_alone(tmp_path):
    (tmp_path / "file").write_bytes(b"before" + b"x" * 2_500_000 + b"after")
    ref = TensorRef("x", "U8", (2_500_000,), str(tmp_path / "file"), 6, 2_500_000)

    assert tensor_digest(ref) == f"xxh3_128:{xxhash.xxh3_128_hexdigest(b'x' * 2_500_000)}"


def test_a_home_directory_stands_for_its_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))

    assert user_path("~/models") == tmp_path / "models"
    assert output_path("~/models/../out") == tmp_path / "out"
    assert output_path("~/models/..") == tmp_path


@pytest.mark.parametrize("text", ["$HOME/merged", "runs/${NAME}"])
def test_an_output_with_a_variable_in_its_name_is_not_made(text):
    with pytest.raises(ResolveError, match="contains a shell variable"):
        output_path(text)


def test_an_output_that_is_a_link_keeps_its_own_name(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to("elsewhere")

    assert output_path(str(tmp_path / "folder" / "link")) == tmp_path / "real" / "link"


@pytest.mark.parametrize("take", [user_path, output_path])
@pytest.mark.parametrize(
    ("text", "words"), [("~nobody-of-that-name/x", "there is no user"), ("a\0b", "holds a NUL character")]
)
def test_a_text_that_is_no_path_is_an_error_with_a_sentence(take, text, words):
    with pytest.raises(ResolveError, match=words):
        take(text)


def test_a_key_that_stands_twice_among_many_is_found_at_once(tmp_path):
    path = tmp_path / "config.json"
    keys = "".join(f'"k{n}": 0, ' for n in range(200_000))
    path.write_text("{" + keys + '"k199999": 0}')
    began = time.process_time()

    with pytest.raises(CheckpointError, match="the key 'k199999' occurs twice"):
        read_json(path)

    assert time.process_time() - began < 10  # by counting each, an hour


def test_a_key_that_stands_twice_is_shown_by_its_beginning(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(f'{{"{"k" * 100_000}": 0, "{"k" * 100_000}": 0}}')
    with pytest.raises(CheckpointError, match="occurs twice") as caught:
        read_json(path)
    assert len(str(caught.value)) < 1000


def test_json_of_more_values_than_are_meant_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": [' + "[]," * 17_000_000 + "0]}")
    tracemalloc.start()

    with pytest.raises(CheckpointError, match=r"about 3[0-9]{7} values, expected at most 16000000"):
        read_json(path)

    assert tracemalloc.get_traced_memory()[1] < 300 << 20
    tracemalloc.stop()
