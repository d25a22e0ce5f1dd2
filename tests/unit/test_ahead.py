"""What is asked of the disk in advance, and in which order pieces of work come."""

from __future__ import annotations

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


def test_ranges_of_a_store_are_left_out(asked):
    assert list(read_ahead([1], lambda n: [("s3://bucket/folder/file", 0, 100)])) == [1]
    assert asked == []


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="missing"):
        list(read_ahead([1], lambda n: [(str(tmp_path / "missing"), 0, 1)]))
