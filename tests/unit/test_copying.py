"""Copies: each byte is read once, for every output and for the digests."""

from __future__ import annotations

import contextlib
import os

import pytest
import xxhash

from lora_merge.core.plan import Copy, Step
from lora_merge.core.shards import place
from lora_merge.core.tensor import TensorRef
from lora_merge.core.weight import WEIGHT
from lora_merge.errors import CheckpointError, WriteError
from lora_merge.merging.worker import copying
from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.stopwatch import Stopwatch
from lora_merge.storage.copy_runs import CopyRun
from lora_merge.storage.folder import Folder
from lora_merge.storage.local_output import FolderSink
from lora_merge.storage.output_files import reserve
from lora_merge.storage.sources import SCHEMES
from tests.toys.storage import Memory

START = 37


def run_of(sizes, file, target="out"):
    """Return copies of neighbours of so many bytes, from a file into another."""
    steps, start = [], 0
    for n, size in enumerate(sizes):
        source = TensorRef(f"t{n}", "U8", (size,), file, START + start, size)
        slot = TensorRef(f"t{n}", "U8", (size,), target, start, size)
        steps.append(Step(slot.name, {WEIGHT: slot}, Copy(source)))
        start += size
    return CopyRun(tuple(steps))


class Kept:
    """A sink that keeps what it is given, block by block; the blocks are used again meanwhile."""

    def __init__(self):
        self.blocks, self.is_open = [], False

    @contextlib.contextmanager
    def copying(self, run, source):
        self.is_open = True
        yield lambda block: self.blocks.append(bytes(block))
        self.is_open = False


@pytest.mark.parametrize("n_outputs", [1, 3])
@pytest.mark.parametrize("block_bytes", [1, 7, 100, 1 << 18])
@pytest.mark.parametrize(
    "sizes", [[10], [0], [0, 0], [3, 4, 0, 7], [0, 100, 0], [7, 7, 7], [1] * 9, [500, 0, 0, 1500]], ids=str
)
def test_every_byte_is_read_once_whatever_number_of_outputs_wants_it(
    sizes, block_bytes, n_outputs, monkeypatch
):
    monkeypatch.setattr(copying, "COPY_BYTES", block_bytes)
    data = os.urandom(START + sum(sizes) + 5)
    toy = Memory({"mem://file": data})
    monkeypatch.setitem(SCHEMES, "mem", toy)
    runs = [run_of(sizes, "mem://file", f"out{n}") for n in range(n_outputs)]
    sinks = [Kept() for _ in runs]
    records = copy(list(zip(sinks, runs, strict=True)), Stopwatch())

    assert (toy.n_opened, toy.n_read) == (1, sum(sizes))
    for sink, run, own in zip(sinks, runs, records, strict=True):
        assert b"".join(sink.blocks) == data[START : START + sum(sizes)]
        assert not sink.is_open
        assert [(one.name, one.file, one.nbytes) for one in own] == [
            (slot.name, slot.file, slot.nbytes) for slot in run.slots
        ]
        for one, source in zip(own, run.sources, strict=True):
            assert one.digest == f"xxh3_128:{xxhash.xxh3_128_hexdigest(data[source.start : source.end])}"
            assert one.finite


def test_the_bytes_of_a_run_are_where_the_plan_has_them(tmp_path):
    sizes = [5, 300_000, 0, 11, 70_000]
    data = os.urandom(START + sum(sizes))
    (tmp_path / "source").write_bytes(data)
    folder = tmp_path / "out"
    folder.mkdir()
    refs = [TensorRef(f"t{n}", "U8", (size,), "", 0, size) for n, size in enumerate(sizes)]
    file = place("model.safetensors", refs, {})
    reserve(Folder.of(folder), file)
    steps = [
        Step(slot.name, {WEIGHT: slot}, Copy(source))
        for slot, source in zip(file.slots, run_of(sizes, str(tmp_path / "source")).sources, strict=True)
    ]
    copy([(FolderSink(Folder.of(folder)), CopyRun(tuple(steps)))], Stopwatch())
    start = file.slots[0].start
    written = (folder / "model.safetensors").read_bytes()
    assert written[start:] == data[START:]
    assert len(written) == file.nbytes


def test_a_source_that_ends_too_soon_is_no_copy(tmp_path):
    (tmp_path / "source").write_bytes(bytes(START + 9))
    with pytest.raises(CheckpointError, match=f"ends at byte {START + 9}, expected {START + 10} or more"):
        copy([(Kept(), run_of([10], str(tmp_path / "source")))], Stopwatch())


def test_a_file_that_is_not_there_to_be_filled_is_an_error(tmp_path):
    (tmp_path / "source").write_bytes(bytes(START + 10))
    (tmp_path / "out").mkdir()
    sink = FolderSink(Folder.of(tmp_path / "out"))
    with pytest.raises(WriteError, match="cannot be written"):
        copy([(sink, run_of([10], str(tmp_path / "source")))], Stopwatch())
