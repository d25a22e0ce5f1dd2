"""What is asked of the disk in advance, and in which order pieces of work come."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lora_merge.errors import CheckpointError
from lora_merge.storage import ahead
from lora_merge.storage.ahead import read_ahead
from lora_merge.storage.local import LocalSource


@pytest.fixture
def asked(monkeypatch):
    """Return the ranges that were asked for so far; they are really asked for."""
    found, ask = [], LocalSource.ahead

    def noted(source, start, nbytes):
        found.append((start, nbytes))
        ask(source, start, nbytes)

    monkeypatch.setattr(LocalSource, "ahead", noted)
    return found


def test_pieces_come_in_order_and_later_ranges_are_asked_for_first(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(ahead, "_AHEAD_BYTES", 250)
    file = tmp_path / "file"
    file.write_bytes(bytes(1000))
    pieces = read_ahead(range(10), lambda n: [(str(file), 100 * n, 100)])
    seen = [(n, len(asked)) for n in pieces]
    assert [n for n, _ in seen] == list(range(10))
    assert asked == [(100 * n, 100) for n in range(10)]
    assert [n_asked for _, n_asked in seen] == [3, 4, 5, 6, 7, 8, 9, 10, 10, 10]


def test_pieces_without_ranges_are_not_kept_back_for_ever(asked, monkeypatch):
    monkeypatch.setattr(ahead, "_AHEAD_ITEMS", 3)
    taken = []

    def items():
        for n in range(10):
            taken.append(n)
            yield n

    assert next(read_ahead(items(), lambda n: ())) == 0
    assert taken == [0, 1, 2, 3]
    assert asked == []


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_of_many_files_one_is_open_at_a_time(tmp_path):
    files = [tmp_path / f"file-{n}" for n in range(20)]
    for file in files:
        file.write_bytes(bytes(100))

    def n_open():
        return sum(Path(link).resolve() in files for link in Path("/proc/self/fd").iterdir())

    found = [n_open() for _ in read_ahead(files, lambda file: [(str(file), 0, 50), (str(file), 50, 50)])]
    assert max(found) == 1
    assert n_open() == 0


def test_ranges_of_a_store_are_left_out(asked):
    assert list(read_ahead([1], lambda n: [("s3://bucket/folder/file", 0, 100)])) == [1]
    assert asked == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        list(read_ahead([1], lambda n: [(str(tmp_path / "missing"), 0, 1)]))
