"""What every storage keeps, for each member of `SCHEMES` and for a toy; and a merge of weights that only the toy has."""

from __future__ import annotations

import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

from lora_merge.errors import ChangedError, CheckpointError
from lora_merge.formats.safetensors import read_header
from lora_merge.merging.unchanged_inputs import check, lasting
from lora_merge.planning import run
from lora_merge.planning.resolve import resolve_base
from lora_merge.storage.digests import file_digest, files_digest, range_digest
from lora_merge.storage.input_files import watching
from lora_merge.storage.reading import read_blocks, read_into, stream_of
from lora_merge.storage.sources import SCHEMES, identity_at, open_source, version_at
from tests.faults.trial import content
from tests.toys.storage import Memory

DATA = bytes(range(256)) * 40


@dataclass
class Kept:
    """A file in a storage."""

    text: str
    put: Any
    """Gives it other content; none removes it."""


def in_local(tmp_path, monkeypatch):
    path = tmp_path / "file"

    def put(data):
        if data is None:
            path.unlink()
            return
        path.with_name("new").write_bytes(data)
        path.with_name("new").replace(path)

    return Kept(str(path), put)


def in_memory(tmp_path, monkeypatch):
    toy = Memory({})
    monkeypatch.setitem(SCHEMES, "mem", toy)
    text = "mem://file"

    def put(data):
        if data is None:
            del toy.files[text]
        else:
            toy.files[text] = data

    return Kept(text, put)


MAKERS = {"": in_local, "mem": in_memory}
"""How a test puts a file into each storage."""

OF_SERVERS = {"s3", "gs", "az", "file", "hf"}
"""They read one version only, and need a server: ``tests/stores`` and ``tests/hub`` hold them to the same."""


@pytest.fixture(params=sorted({*SCHEMES, "mem"} - OF_SERVERS), ids=lambda name: name or "local")
def kept(request, tmp_path, monkeypatch):
    """A file of `DATA` in each storage."""
    made = MAKERS[request.param](tmp_path, monkeypatch)
    made.put(DATA)
    return made


def test_a_source_has_the_name_the_size_and_the_bytes(kept):
    buffer = memoryview(bytearray(5000))
    with open_source(kept.text) as source:
        assert (source.text, source.nbytes) == (kept.text, len(DATA))
        read_into(source, buffer, 3000)
        assert bytes(buffer) == DATA[3000:8000]
        n_read = source.read_into(buffer, 10)
        assert 0 < n_read <= 5000
        assert bytes(buffer[:n_read]) == DATA[10 : 10 + n_read]
        assert b"".join(map(bytes, read_blocks(source, 7, len(DATA) - 7, 1024))) == DATA[7:]
        assert source.read_into(buffer[:0], 0) == 0


@pytest.mark.parametrize("offset", [len(DATA), len(DATA) + 1, 1 << 40, 1 << 62, 1 << 64])
def test_behind_its_end_there_is_nothing(kept, offset):
    with open_source(kept.text) as source:
        assert source.read_into(memoryview(bytearray(8)), offset) == 0
        with pytest.raises(CheckpointError, match=f"ends at byte {offset}"):
            read_into(source, memoryview(bytearray(8)), offset)


def test_a_source_that_ends_too_soon_is_named(kept):
    with open_source(kept.text) as source, pytest.raises(CheckpointError) as caught:
        read_into(source, memoryview(bytearray(20)), len(DATA) - 4)
    assert f"{kept.text}: ends at byte {len(DATA)}, expected {len(DATA) + 16} or more" in str(caught.value)


def test_a_wish_for_what_is_read_next_never_fails(kept):
    with open_source(kept.text) as source:
        for start, nbytes in ((0, 10), (0, 0), (len(DATA) + 5, 10), (5, 1 << 50)):
            source.ahead(start, nbytes)


def test_several_threads_read_at_once(kept):
    with open_source(kept.text) as source, ThreadPoolExecutor(4) as pool:

        def read(start):
            buffer = bytearray(2000)
            read_into(source, memoryview(buffer), start)
            return bytes(buffer)

        starts = range(0, len(DATA) - 2000, 37)
        assert list(pool.map(read, starts)) == [DATA[start : start + 2000] for start in starts]


def test_a_version_is_that_of_the_bytes(kept):
    with open_source(kept.text) as source, open_source(kept.text) as again:
        assert source.version == again.version == version_at(kept.text) == identity_at(kept.text)
        assert source.version.size == source.nbytes
        assert pickle.loads(pickle.dumps(source.version)) == source.version
        kept.put(DATA[::-1])
        assert version_at(kept.text) != source.version
        buffer = bytearray(len(DATA))
        read_into(source, memoryview(buffer), 0)
        assert bytes(buffer) == DATA  # an open source keeps its bytes when another file takes the name


def test_nothing_has_the_name_of_what_is_gone(kept):
    kept.put(None)
    with pytest.raises(CheckpointError, match="cannot be opened"), open_source(kept.text):
        pass
    with pytest.raises(FileNotFoundError):
        version_at(kept.text)
    with pytest.raises(ChangedError, match="disappeared"):
        identity_at(kept.text)


def test_digests_are_those_of_the_bytes(kept):
    whole = f"xxh3_128:{xxhash.xxh3_128_hexdigest(DATA)}"
    assert file_digest(kept.text) == files_digest([kept.text]) == whole
    with open_source(kept.text) as source:
        part = range_digest(source, 5, 2100)
        assert part == f"xxh3_128:{xxhash.xxh3_128_hexdigest(DATA[5:2105])}"
        assert range_digest(source, 5, 2100, cached_only=True) in {part, None}
    with pytest.raises(CheckpointError, match=f"has {len(DATA)} bytes, expected at most 10"):
        file_digest(kept.text, 10)


def test_a_source_is_a_file_of_python(kept):
    with open_source(kept.text) as source, stream_of(source) as stream:
        assert stream.read(6) == DATA[:6]
        assert stream.tell() == 6
        assert stream.seek(-4, os.SEEK_END) == len(DATA) - 4
        assert stream.read() == DATA[-4:]
        stream.seek(100)
        stream.seek(20, os.SEEK_CUR)
        assert stream.read(5000) == DATA[120:5120]
        with pytest.raises(OSError, match="before the beginning"):
            stream.seek(-1)


def test_what_takes_the_name_of_an_input_is_noticed(kept):
    with watching() as seen, open_source(kept.text) as source:
        read_into(source, memoryview(bytearray(100)), 0)
    check(seen.inputs(), {})
    kept.put(DATA[::-1])
    changed = pytest.raises(ChangedError, match="changed while it was read")
    with watching(seen.inputs()), changed, open_source(kept.text):
        pass
    with pytest.raises(ChangedError):
        check(seen.inputs(), {})
    with watching() as later, open_source(kept.text):
        pass
    assert lasting(later.inputs()) != lasting(seen.inputs())


def test_a_text_of_a_scheme_that_nobody_has_is_a_path():
    with pytest.raises(CheckpointError, match="cannot be opened"), open_source("gopher://x/y"):
        pass


@pytest.mark.parametrize("max_shard_size", [None, "60KB"])
@pytest.mark.parametrize("verify", ["sample", "full"])
def test_weights_of_a_base_are_merged_from_a_storage_that_is_no_disk(
    max_shard_size, verify, pico, pico_adapter, cli, tmp_path, monkeypatch
):
    """One file (`tests/toys/storage.py`) and one line; the only copy of the weights is in memory."""
    whole = pico("llama", "bfloat16", max_shard_size)
    adapter, base = pico_adapter(whole), tmp_path / whole.name
    shutil.copytree(whole, base)
    arguments = ["--adapter", adapter, "--verify", verify, "--out"]
    done = cli("--base", base, *arguments, tmp_path / "wanted" / "out")
    assert done.exit_code == 0, done.stderr

    files = {path.name: path for path in base.glob("*.safetensors")}
    toy = Memory({f"mem://base/{name}": path.read_bytes() for name, path in files.items()})
    for path in files.values():
        path.unlink()
    monkeypatch.setitem(SCHEMES, "mem", toy)
    monkeypatch.setattr(run, "resolve_base", lambda root, *_: resolve_base(root, "mem://base"))
    done = cli("--base", base, *arguments, tmp_path / "out")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert content(tmp_path / "out") == content(tmp_path / "wanted" / "out")
    assert toy.n_opened > len(files)


def test_a_base_in_a_storage_that_changes_meanwhile_is_noticed(pico, pico_adapter, tmp_path, monkeypatch):
    import lora_merge

    whole = pico("llama", "bfloat16", None)
    name = "model.safetensors"
    toy = Memory({f"mem://base/{name}": (whole / name).read_bytes()})
    base = tmp_path / whole.name
    shutil.copytree(whole, base, ignore=shutil.ignore_patterns(name))
    monkeypatch.setitem(SCHEMES, "mem", toy)
    monkeypatch.setattr(run, "resolve_base", lambda root, *_: resolve_base(root, "mem://base"))

    class Hook:
        def phase(self, name, nbytes):
            if name == "merging":
                ((text, data),) = toy.files.items()
                toy.files[text] = data[:-1] + bytes([data[-1] ^ 1])

        def advance(self, nbytes): ...
        def done(self, name): ...

    with pytest.raises(ChangedError):
        lora_merge.merge(base=base, adapter=pico_adapter(whole), out=tmp_path / "out", observer=Hook())
    assert not (tmp_path / "out").exists()


def test_a_shard_that_the_storage_lacks_is_named(pico, tmp_path, monkeypatch):
    whole = pico("llama", "bfloat16", "60KB")
    files = {f"mem://base/{path.name}": path.read_bytes() for path in whole.glob("*.safetensors")}
    gone = min(files)
    del files[gone]
    monkeypatch.setitem(SCHEMES, "mem", Memory(files))
    with pytest.raises(CheckpointError, match=f"does not have {Path(gone).name}"):
        resolve_base(whole, "mem://base")


def test_a_header_is_read_through_the_table(pico, monkeypatch):
    path = pico() / "model.safetensors"
    monkeypatch.setitem(
        SCHEMES, "mem", Memory({"mem://x": path.read_bytes(), "mem://page": b"<!DOCTYPE html>"})
    )
    found = read_header("mem://x")
    assert {ref.file for ref in found.tensors} == {"mem://x"}
    assert [ref.name for ref in found.tensors] == [ref.name for ref in read_header(path).tensors]
    with pytest.raises(CheckpointError, match="is a web page"):
        read_header("mem://page")
