"""How an output gets its name."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path

import pytest

from lora_merge.core.tensor import TensorRecord
from lora_merge.errors import CheckpointError, WriteError
from lora_merge.storage import flushing, publish, staging
from lora_merge.storage.folder import Folder
from lora_merge.storage.journal import Journal


def left_by_a_run(out):
    root = staging.staging_path(out)
    root.mkdir()
    fill(root / "output", "half")
    return root


def fill(path, text):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(text)
    return path


@pytest.fixture(params=[True, False], ids=["a kernel that can exchange", "one that cannot"])
def renames(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(publish, "renamed", lambda one, other, flag: False)


def test_a_staged_directory_takes_the_place_of_the_old_one(renames, tmp_path):
    out = fill(tmp_path / "out", "old")
    with staging.staging(out, overwrite=True) as stage:
        fill(stage.output, "new")
        staging.publish(stage)

    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_read_only_output_is_replaced_and_removed(renames, tmp_path):
    out = fill(tmp_path / "out", "old")
    fill(out / "deep", "old").chmod(0)
    out.chmod(0o500)
    with staging.staging(out, overwrite=True) as stage:
        fill(stage.output, "new")
        staging.publish(stage)

    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_left_is_cleared(tmp_path):
    out = tmp_path / "out"
    left = left_by_a_run(out)
    (left / "output" / "deep").mkdir()
    assert staging.stale_bytes(out) > 0

    with staging.staging(out) as stage:
        assert list(stage.root.iterdir()) == [stage.output]
        assert list(stage.output.iterdir()) == []
        staging.publish(stage)


def test_what_a_killed_run_left_is_there_for_one_that_resumes(tmp_path):
    out = tmp_path / "out"
    left_by_a_run(out)

    with staging.staging(out, resume=True) as stage:
        assert (stage.output / "config.json").read_text() == "half"


@pytest.mark.parametrize(
    ("exc", "is_kept"),
    [
        (KeyboardInterrupt(), True),
        (WriteError("full"), True),
        (CheckpointError("f", "", "gone"), True),
        (KeyError(), False),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("n_records", [0, 1])
def test_what_is_written_stays_after_a_fault_from_without(exc, is_kept, n_records, tmp_path):
    record = TensorRecord("x", "model.safetensors", 8, "xxh3_128:01", finite=True)
    out = tmp_path / "out"

    def fail():
        with staging.staging(out) as stage, Journal(stage.home, "this merge", [record] * n_records):
            fill(stage.output, "half")
            raise exc

    with pytest.raises(type(exc)) as caught:
        fail()

    notes = getattr(caught.value, "__notes__", [])
    if is_kept and n_records:
        assert (staging.staging_path(out) / "output" / "config.json").read_text() == "half"
        assert len(notes) == 1
        assert notes[0].startswith(
            f"run again with --resume to continue: 1 finished tensor kept in {staging.staging_path(out)};"
        )
    else:
        assert list(tmp_path.iterdir()) == []
        assert notes == []


def test_an_error_clears_staging(tmp_path):
    with pytest.raises(FileNotFoundError), staging.staging(tmp_path / "deep" / "out") as stage:
        (fill(stage.output, "half") / "nothing").read_bytes()

    assert list((tmp_path / "deep").iterdir()) == []


def test_an_interrupt_after_the_output_has_its_name_leaves_nothing_beside_it(tmp_path):
    record = TensorRecord("x", "model.safetensors", 8, "xxh3_128:01", finite=True)
    out = tmp_path / "out"

    def interrupted():
        with staging.staging(out) as stage, Journal(stage.home, "this merge", [record]):
            fill(stage.output, "whole")
            staging.publish(stage)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()

    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not hasattr(caught.value, "__notes__")


def test_an_interrupt_while_staging_is_removed_leaves_nothing_beside_the_output(tmp_path, monkeypatch):
    out = tmp_path / "out"
    clear, calls = staging.dirs.clear, []

    def interrupted_once(fd):
        calls.append(fd)
        if len(calls) == 2:  # the first one clears what another run left
            raise KeyboardInterrupt
        clear(fd)

    def publish_one():
        with staging.staging(out) as stage:
            fill(stage.output, "whole")
            staging.publish(stage)

    monkeypatch.setattr(staging.dirs, "clear", interrupted_once)
    with pytest.raises(KeyboardInterrupt):
        publish_one()

    assert len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_lock_is_free_again_after_a_run(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(KeyError), staging.staging(out) as staged:  # noqa: PT012 - the second raise is the point
            with (
                Journal(staged.home, "this merge"),
                pytest.raises(WriteError, match=rf"another run .*\(process {os.getpid()} "),
            ):
                staging.staging(out).__enter__()
            raise KeyError(staged)


def test_a_filesystem_without_locks_goes_without(tmp_path, monkeypatch):
    import fcntl

    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with staging.staging(tmp_path / "out") as stage:
        fill(stage.output, "new")
        staging.publish(stage)
    assert (tmp_path / "out" / "config.json").read_text() == "new"


def test_a_link_in_the_place_of_staging_is_not_followed(tmp_path):
    fill(tmp_path / "elsewhere", "mine")
    staging.staging_path(tmp_path / "out").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(WriteError, match="staging"), staging.staging(tmp_path / "out"):
        pass
    assert (tmp_path / "elsewhere" / "config.json").read_text() == "mine"


def test_a_link_is_never_replaced(tmp_path):
    fill(tmp_path / "real", "text")
    (tmp_path / "out").symlink_to(tmp_path / "real")

    with pytest.raises(WriteError, match=r"already exists and is a link to .*real"):
        staging.check_replaceable(tmp_path / "out", overwrite=True, inputs=())


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_cannot_be_replaced_is_never_told_of_overwrite_as_a_way_out(overwrite, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    for name, what in (("file", "a file"), ("home", "not a model checkpoint"), ("link", "a link to")):
        with pytest.raises(WriteError, match=f"already exists and is {what}") as caught:
            staging.check_replaceable(tmp_path / name, overwrite=overwrite, inputs=())
        assert "pass --overwrite" not in caught.value.hint


@pytest.mark.parametrize("out", ["input/out", "input/deep/out", "link/out", "input"])
def test_an_output_has_a_place_of_its_own_whatever_links_lead_there(out, tmp_path):
    fill(tmp_path / "input", "mine")
    (tmp_path / "link").symlink_to(tmp_path / "input")
    source = tmp_path / "link" if out.startswith("input/") else tmp_path / "input"

    with pytest.raises(WriteError, match=r"the input"):
        staging.check_replaceable(tmp_path / out, overwrite=True, inputs=(source,))
    staging.check_replaceable(tmp_path / "input-merged", overwrite=True, inputs=(source,))


@pytest.mark.parametrize(("flag", "words"), [(os.ST_RDONLY, "Read-only"), (0, "Permission denied")])
def test_a_disk_that_takes_nothing_is_not_called_full(flag, words, tmp_path, monkeypatch):
    real = os.statvfs(tmp_path)
    fields = [*real[:8], flag, *real[9:]]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))

    with pytest.raises(WriteError, match=words) as caught:
        staging.check_writable(tmp_path / "new" / "out")

    assert "choose an --out" in caught.value.hint


def test_an_output_below_a_file_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(WriteError, match=r"cannot be created, because .*file is a file"):
        staging.check_writable(tmp_path / "file" / "out")


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file"), staging.staging(tmp_path / "file" / "out"):
        pass


def test_what_is_staged_is_flushed_once_it_has_been_waited_for(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    monkeypatch.setattr(flushing, "_PAUSE_SECONDS", 60)
    with flushing.Flushing(Folder.of(fill(tmp_path, "text"))) as flusher:
        flusher.wait()
    assert flushed == [f"{tmp_path}/config.json", str(tmp_path)]


def test_what_is_being_written_is_sent_to_the_disk_already(tmp_path, monkeypatch):
    flushed = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.set())
    with flushing.Flushing(Folder.of(tmp_path)) as flusher:
        assert flushed.wait(60)
        flushed.clear()
        assert flushed.wait(60)  # again
        flusher.wait()


def test_at_rest_a_file_is_flushed_once_it_is_finished_and_no_other(tmp_path, monkeypatch):
    flushed, once = [], threading.Event()

    def note(fd):
        flushed.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        once.set()

    folder = Folder.of(fill(tmp_path / "staged", "text"))
    (tmp_path / "staged" / "model.safetensors").write_text("weights")
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(flushing, "_PAUSE_SECONDS", 0.001)
    flusher = flushing.Flushing(folder)
    flusher.rest()
    with flusher:
        flusher.add("gone.safetensors")  # does no harm
        assert not once.wait(0.05)
        flusher.add("model.safetensors")
        assert once.wait(60)
        assert flushed == ["model.safetensors"]
        flusher.wait()
    assert sorted(flushed[1:]) == ["config.json", "model.safetensors", "staged"]


def test_a_disk_that_fails_while_flushing_is_a_write_error(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with flushing.Flushing(Folder.of(tmp_path)) as flusher, pytest.raises(WriteError, match="no space left"):
        flusher.wait()


def test_after_an_error_nobody_waits_for_the_disk_and_nothing_more_is_flushed(tmp_path, monkeypatch):
    began, enough, flushed = threading.Event(), threading.Event(), []

    def slow(fd):
        began.set()
        enough.wait(60)
        flushed.append(fd)

    monkeypatch.setattr(os, "fsync", slow)
    with contextlib.suppress(KeyError), flushing.Flushing(Folder.of(tmp_path)) as flusher:
        assert began.wait(60)
        raise KeyError
    assert flushed == []  # it is still at it
    enough.set()
    flusher.wait()
    assert len(flushed) == 1
