"""What a run wrote is known to the next one, as far as it can be believed."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest

from lora_merge.core.tensor import Survival, TensorRecord
from lora_merge.errors import WriteError
from lora_merge.storage import journal
from lora_merge.storage.folder import Folder
from lora_merge.storage.journal import Journal

COPY = TensorRecord("model.norm.weight", "model.safetensors", 8, "xxh3_128:01", finite=True)
MERGED = TensorRecord(
    "ü",
    "a/b.safetensors",
    1 << 40,
    "xxh3_128:02",
    finite=False,
    survival=Survival(1.5, 0.1, 1e-9, 1 / 3, 0.5, 0.01, 2.0, 1e-3),
    source={"weight": "xxh3_128:04", "scale": "xxh3_128:05"},
    suspects=((0, 3), (7, 8)),
    blocks=((0, 1 << 20, "xxh3_128:03"),),
)


@pytest.fixture
def home(tmp_path):
    return Folder.of(tmp_path)


@pytest.fixture
def path(home):
    return home.path / journal.FILE


def test_what_was_added_is_read_back(path, home):
    with Journal(home, "this merge") as lines:
        lines.add([COPY])
        lines.add([MERGED])

        assert journal.read(home, "this merge") == [COPY, MERGED]  # while it is still written, too
    assert journal.count(home) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_journal_that_goes_on_begins_with_what_is_done(path, home):
    with Journal(home, "this merge", [COPY]) as lines:
        lines.add([MERGED])

    assert journal.read(home, "this merge") == [COPY, MERGED]


def test_the_journal_of_another_merge_says_nothing(path, home):
    with Journal(home, "another merge", [COPY]):
        pass

    assert journal.read(home, "this merge") is None


def test_a_journal_names_its_process(path, home):
    assert journal.owner(home) == ""
    with Journal(home, "this merge"):
        assert journal.owner(home) == f"process {os.getpid()} on {os.uname().nodename}"


@pytest.mark.parametrize(
    "tail",
    [
        b'["model.embed", "model.sa',
        b"\x00\xff\n",
        b"[1, 2]\n",
        b'["a", "b", "8", "c", true, null, null, []]\n',
        b'["a", "b", 8, "c", true, null]\n',
        b'["a", "b", 8, "c", true, [1], null, []]\n',
        b'["a", "b", 8, "c", true, null, [[1]], []]\n',
        b'["a", "b", 8, "c", true, null, null, [[1, 2]]]\n',
        b'["a", "b", 8, "c", true, null, 7, 7]\n',
        b"{}\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
    ],
    ids=lambda tail: repr(tail[:20]),
)
def test_what_was_cut_off_or_makes_no_sense_is_left_out(tail, path, home):
    with Journal(home, "this merge", [COPY]):
        pass
    with path.open("ab") as file:
        file.write(tail)

    assert journal.read(home, "this merge") == [COPY]


@pytest.mark.parametrize(
    "text", [b"", b"[]\n", b"7\n", b'{"journal": 99, "merge": "this merge"}\n', b"\xff\n"], ids=repr
)
def test_a_file_that_is_no_journal_says_nothing(text, path, home):
    path.write_bytes(text)

    assert journal.read(home, "this merge") is None
    assert journal.count(home) == 0
    assert journal.owner(home) == ""


def test_a_journal_that_cannot_be_written_is_a_write_error(path, home):
    with Journal(home, "this merge") as lines:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, lines._fd)
        with pytest.raises(WriteError, match="no space left"):
            lines.add([COPY])
        os.close(full)
    gone = replace(home, path=path.parent / "never-made")
    with pytest.raises(WriteError, match="never-made"):
        Journal(gone, "this merge")


def test_what_was_planted_in_the_place_of_a_journal_is_neither_read_nor_written(path, home, tmp_path):
    (tmp_path / "thesis.txt").write_text('{"journal": 1, "merge": "this merge"}\n')
    before = (tmp_path / "thesis.txt").read_bytes()
    for name in (journal.FILE, journal.FRESH_FILE):
        (tmp_path / name).symlink_to(tmp_path / "thesis.txt")

    assert journal.read(home, "this merge") is None
    with Journal(home, "this merge", [COPY]):
        pass
    assert journal.read(home, "this merge") == [COPY]
    assert not path.is_symlink()
    assert (tmp_path / "thesis.txt").read_bytes() == before


def test_a_pipe_in_the_place_of_a_journal_holds_nobody_up(path, home):
    os.mkfifo(path)

    assert journal.read(home, "this merge") is None
    assert journal.owner(home) == ""


def test_a_line_is_one_line_whatever_the_name(path, home):
    odd = TensorRecord("a\nb\u2028\x1b", "f", 1, "d", finite=True)
    with Journal(home, "this merge", [odd]):
        pass

    assert len(path.read_bytes().split(b"\n")) == 3
    assert json.loads(path.read_bytes().split(b"\n")[1])[0] == odd.name
    assert journal.read(home, "this merge") == [odd]
