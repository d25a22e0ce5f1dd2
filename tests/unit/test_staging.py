"""How an output gets its name."""

from __future__ import annotations

import contextlib
import errno
import threading

import pytest

from lora_merge.errors import WriteError
from lora_merge.io import staging


def fill(path, text):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(text)
    return path


@pytest.mark.parametrize("kernel_can_exchange", [True, False])
def test_a_staged_directory_takes_the_place_of_the_old_one(kernel_can_exchange, tmp_path, monkeypatch):
    if not kernel_can_exchange:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    out = fill(tmp_path / "out", "old")
    with staging.staging(out) as staged:
        fill(staged, "new")
        staging.publish(staged, out)

    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_half_way_puts_the_old_output_back(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    out = fill(tmp_path / "out", "old")
    missing = tmp_path / "never-made"

    with pytest.raises(OSError, match="never-made"):
        staging._replace(missing, out)

    assert (out / "config.json").read_text() == "old"


def test_what_a_killed_run_left_is_cleared(tmp_path):
    out = tmp_path / "out"
    fill(staging.staging_path(out), "half")
    (staging.staging_path(out) / "deep").mkdir()
    assert staging.stale_bytes(out) > 0

    with staging.staging(out) as staged:
        assert list(staged.iterdir()) == []
        staging.publish(staged, out)


def test_an_error_clears_staging(tmp_path):
    with pytest.raises(FileNotFoundError), staging.staging(tmp_path / "deep" / "out") as staged:
        (fill(staged, "half") / "nothing").read_bytes()

    assert list((tmp_path / "deep").iterdir()) == []


def test_the_lock_is_free_again_after_a_run(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyError), staging.staging(out) as staged:  # noqa: PT012 - the second raise is the point
            with pytest.raises(WriteError, match="another run"):
                staging.staging(out).__enter__()
            raise KeyError(staged)


def test_a_link_is_never_replaced(tmp_path):
    fill(tmp_path / "real", "text")
    (tmp_path / "out").symlink_to(tmp_path / "real")

    with pytest.raises(WriteError, match="no model checkpoint"):
        staging.check_replaceable(tmp_path / "out", overwrite=True, inputs=())


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"), staging.staging(tmp_path / "file" / "out"):
        pass


def test_what_is_staged_is_flushed_once_it_has_been_waited_for(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(staging, "_fsync", lambda path: flushed.append(path.name))
    monkeypatch.setattr(staging, "_PAUSE_SECONDS", 60)
    with staging.Flushing(fill(tmp_path, "text")) as flushing:
        flushing.wait()
    assert flushed == ["config.json", tmp_path.name]


def test_what_is_being_written_is_sent_to_the_disk_already(tmp_path, monkeypatch):
    flushed = threading.Event()
    monkeypatch.setattr(staging, "_fsync", lambda path: flushed.set())
    with staging.Flushing(tmp_path) as flushing:
        assert flushed.wait(60)
        flushed.clear()
        assert flushed.wait(60)  # again
        flushing.wait()


def test_a_disk_that_fails_while_flushing_is_a_write_error(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(staging, "_fsync", fail)
    with staging.Flushing(tmp_path) as flushing, pytest.raises(WriteError, match="no space left"):
        flushing.wait()


def test_after_an_error_nobody_waits_for_the_disk_and_nothing_more_is_flushed(tmp_path, monkeypatch):
    began, enough, flushed = threading.Event(), threading.Event(), []

    def slow(path):
        began.set()
        enough.wait(60)
        flushed.append(path)

    monkeypatch.setattr(staging, "_fsync", slow)
    with contextlib.suppress(KeyError), staging.Flushing(tmp_path) as flushing:
        assert began.wait(60)
        raise KeyError
    assert flushed == []  # it is still at it
    enough.set()
    flushing.wait()
    assert flushed == [tmp_path]
