"""What a run wrote is known to the next one, as far as it can be believed."""

from __future__ import annotations

import json
import os

import pytest

from lora_merge.core.tensor import Survival, TensorRecord
from lora_merge.errors import WriteError
from lora_merge.io import journal
from lora_merge.io.journal import Journal

COPY = TensorRecord("model.norm.weight", "model.safetensors", 8, "xxh3_128:01", finite=True)
MERGED = TensorRecord(
    "ü", "a/b.safetensors", 1 << 40, "xxh3_128:02", finite=False, survival=Survival(1.5, 0.1, 1e-9, 1 / 3)
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


def test_what_was_added_is_read_back(path):
    with Journal(path, "this merge") as lines:
        lines.add([COPY])
        lines.add([MERGED])

        assert journal.read(path, "this merge") == [COPY, MERGED]  # while it is still written, too
    assert journal.count(path) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_journal_that_goes_on_begins_with_what_is_done(path):
    with Journal(path, "this merge", [COPY]) as lines:
        lines.add([MERGED])

    assert journal.read(path, "this merge") == [COPY, MERGED]


def test_the_journal_of_another_merge_says_nothing(path):
    with Journal(path, "another merge", [COPY]):
        pass

    assert journal.read(path, "this merge") is None


def test_a_journal_names_its_process(path):
    assert journal.owner(path) == ""
    with Journal(path, "this merge"):
        assert journal.owner(path) == f"process {os.getpid()} on {os.uname().nodename}"


@pytest.mark.parametrize(
    "tail",
    [
        b'["model.embed", "model.sa',
        b"\x00\xff\n",
        b"[1, 2]\n",
        b'["a", "b", "8", "c", true, null]\n',
        b'["a", "b", 8, "c", true, [1]]\n',
        b"{}\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda tail: repr(tail[:20]),
)
def test_what_was_cut_off_or_makes_no_sense_is_left_out(tail, path):
    with Journal(path, "this merge", [COPY]):
        pass
    with path.open("ab") as file:
        file.write(tail)

    assert journal.read(path, "this merge") == [COPY]


@pytest.mark.parametrize(
    "text", [b"", b"[]\n", b"7\n", b'{"journal": 2, "merge": "this merge"}\n', b"\xff\n"], ids=repr
)
def test_a_file_that_is_no_journal_says_nothing(text, path):
    path.write_bytes(text)

    assert journal.read(path, "this merge") is None
    assert journal.count(path) == 0
    assert journal.owner(path) == ""


def test_a_journal_that_cannot_be_written_is_a_write_error(path):
    with Journal(path, "this merge") as lines:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, lines._fd)
        with pytest.raises(WriteError, match="no space left"):
            lines.add([COPY])
        os.close(full)
    with pytest.raises(WriteError, match="never-made"):
        Journal(path.parent / "never-made" / "journal.jsonl", "this merge")


def test_a_line_is_one_line_whatever_the_name(path):
    odd = TensorRecord("a\nb\u2028\x1b", "f", 1, "d", finite=True)
    with Journal(path, "this merge", [odd]):
        pass

    assert len(path.read_bytes().split(b"\n")) == 3
    assert json.loads(path.read_bytes().split(b"\n")[1])[0] == odd.name
    assert journal.read(path, "this merge") == [odd]
