"""What every kind of destination keeps whose files are written at any place, for each of them in `STORAGES`.

Those that take whole files are held to the same by ``tests/stores``.
"""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from lora_merge.core.plan import Copy, Step
from lora_merge.core.shards import header_bytes, place
from lora_merge.core.tensor import TensorRecord, TensorRef
from lora_merge.core.weight import WEIGHT
from lora_merge.errors import WriteError
from lora_merge.merging.worker.copying import copy
from lora_merge.merging.worker.stopwatch import Stopwatch
from lora_merge.storage.copy_runs import CopyRun
from lora_merge.storage.destination import Wish
from lora_merge.storage.destinations import STORAGES

MERGE = "fingerprint"
MARKS = ("config.json",)


def wish(out, **changes):
    return Wish(str(out), **{"resume": False, "overwrite": False, "marks": MARKS, "inputs": (), **changes})


@pytest.fixture(params=[name for name, storage in STORAGES.items() if not storage.takes_files])
def opened(request):
    """Return a function that takes the place of an output."""
    return STORAGES[request.param].open


@pytest.fixture
def file():
    refs = [TensorRef(name, "U8", (size,), "", 0, size) for name, size in (("a", 5), ("b", 3))]
    return place("model.safetensors", refs, {})


def record(slot):
    return TensorRecord(slot.name, slot.file, slot.nbytes, "digest", finite=True)


def filled(destination, file):
    """Write `b`, then `a` through the sink as another process has it."""
    sink = pickle.loads(pickle.dumps(destination.sink))
    assert sink == destination.sink
    for slot, content in reversed(list(zip(file.slots, (b"aaaaa", b"bbb"), strict=True))):
        with sink.open(slot) as write:
            buffer = bytearray(content)
            write(memoryview(buffer)[:2])
            write(memoryview(buffer)[2:])
            buffer[:] = bytes(len(buffer))  # whoever writes may use its buffer again
        destination.note([record(slot)])
    destination.finish_file(file.name)


def completed(destination, file):
    filled(destination, file)
    destination.write_text("config.json", "{}")
    destination.flush()


WHOLE = b"aaaaabbb"


def test_what_workers_write_appears_when_it_is_committed_and_not_before(opened, file, tmp_path):
    out, source = tmp_path / "out", tmp_path / "side.txt"
    source.write_text("aside")
    destination = opened(wish(out))
    destination.begin([file], MERGE, [], {})
    completed(destination, file)
    destination.copy_in(source, "side.txt")
    assert not out.exists()
    assert (destination.root / file.name).read_bytes() == header_bytes(file) + WHOLE
    assert sorted(destination.listing()) == ["config.json", file.name, "side.txt"]

    destination.commit()

    assert (out / file.name).read_bytes() == header_bytes(file) + WHOLE
    assert (out / "side.txt").read_text() == "aside"
    assert [path.name for path in tmp_path.iterdir() if path != source] == ["out"]


def test_copies_are_the_bytes_of_their_source(opened, file, tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"--" + WHOLE)
    steps = tuple(
        Step(
            slot.name,
            {WEIGHT: slot},
            Copy(TensorRef(slot.name, "U8", slot.shape, str(source), start, slot.nbytes)),
        )
        for slot, start in zip(file.slots, (2, 7), strict=True)
    )
    destination = opened(wish(tmp_path / "out"))
    destination.begin([file], MERGE, [], {})
    copy([(destination.sink, CopyRun(steps))], Stopwatch())
    assert (destination.root / file.name).read_bytes() == header_bytes(file) + WHOLE
    destination.abort(KeyError())


def test_a_fault_of_the_run_leaves_nothing(opened, file, tmp_path):
    destination = opened(wish(tmp_path / "out"))
    destination.begin([file], MERGE, [], {})
    filled(destination, file)

    destination.abort(ValueError("wrong"))
    destination.abort(ValueError("wrong"))  # once more does no harm

    assert not list(tmp_path.iterdir())


def test_an_interrupt_keeps_what_is_whole_and_another_run_goes_on_from_there(opened, file, tmp_path):
    out, fault = tmp_path / "out", KeyboardInterrupt()
    destination = opened(wish(out))
    destination.begin([file], MERGE, [], {"base": 3})
    filled(destination, file)
    destination.abort(fault)
    assert "run again with --resume" in fault.__notes__[0]
    assert not out.exists()

    again = opened(wish(out, resume=True))
    left = again.left(MERGE)
    assert left.records == [record(slot) for slot in reversed(file.slots)]
    assert (left.changed, left.has_journal) == ({"base": 3}, True)
    assert again.left("of another merge").records is None
    assert again.keep([file], [file.name]) == {file.name}
    again.begin([file], MERGE, left.records, {})
    assert (again.root / file.name).read_bytes() == header_bytes(file) + WHOLE
    again.write_text("config.json", "{}")
    again.flush()
    again.commit()

    assert (out / file.name).read_bytes() == header_bytes(file) + WHOLE


def test_a_run_that_does_not_resume_begins_anew(opened, file, tmp_path):
    destination = opened(wish(tmp_path / "out"))
    destination.begin([file], MERGE, [], {})
    filled(destination, file)
    destination.abort(KeyboardInterrupt())

    again = opened(wish(tmp_path / "out"))
    assert again.left(MERGE).records is None
    assert again.listing() == {}
    again.abort(KeyError())


def test_one_run_has_the_place_and_an_output_is_replaced_where_that_is_wanted(opened, file, tmp_path):
    out = tmp_path / "out"
    destination = opened(wish(out))
    with pytest.raises(WriteError, match="another run is writing this output"):
        opened(wish(out))
    destination.begin([file], MERGE, [], {})
    completed(destination, file)
    destination.commit()
    with pytest.raises(WriteError, match="already exists"):
        opened(wish(out))

    again = opened(wish(out, overwrite=True))
    again.begin([], MERGE, [], {})
    again.write_text("config.json", "[]")
    again.flush()
    again.commit()

    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_files_that_share_their_bytes_with_the_base_are_full(opened, file, tmp_path):
    source = tmp_path / "base.safetensors"
    source.write_bytes(header_bytes(file) + WHOLE)
    destination = opened(wish(tmp_path / "out"))
    assert destination.link([file], {file.name: str(source)}, "hard") == {}
    destination.begin([file], MERGE, [], {})
    other = tmp_path / "other"
    other.write_bytes(b"other")
    own = Step("a", {WEIGHT: file.slots[0]}, Copy(TensorRef("a", "U8", (5,), str(other), 0, 5)))
    copy([(destination.sink, CopyRun((own,)))], Stopwatch())  # nothing is left to do
    destination.finish_file(file.name)
    destination.write_text("config.json", "{}")
    destination.flush()
    destination.commit()

    assert (tmp_path / "out" / file.name).samefile(source)


def test_several_workers_fill_a_file_at_once(opened, tmp_path):
    refs = [TensorRef(f"t{n}", "U8", (1000,), "", 0, 1000) for n in range(20)]
    file = place("model.safetensors", refs, {})
    destination = opened(wish(tmp_path / "out"))
    destination.begin([file], MERGE, [], {})

    def write_one(n):
        with destination.sink.open(file.slots[n]) as write:
            write(memoryview(bytes([n]) * 1000))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_one, range(20)))
    content = b"".join(bytes([n]) * 1000 for n in range(20))
    assert (destination.root / file.name).read_bytes() == header_bytes(file) + content
    destination.abort(KeyError())
