"""Which files a run reads: told by everything that opens one, held to what was found first."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lora_merge.core.identity import FileIdentity, InputFile, Inputs
from lora_merge.errors import ChangedError
from lora_merge.merging.unchanged_inputs import changed_times, check, lasting
from lora_merge.storage import page_cache
from lora_merge.storage.digests import range_digest, same_bytes
from lora_merge.storage.input_files import Watch, told, watching
from lora_merge.storage.small_files import read_bytes
from lora_merge.storage.sources import identity_at, open_source

BIG, STEP = 40 << 20, 16 << 20


def seen(path):
    with open_source(path) as source:
        return page_cache.look_at(source)


def settled(path, nbytes):
    """A file of zeros that is on the disk, and whose last change is a while ago."""
    path.write_bytes(bytes(nbytes))
    with path.open("r+b") as file:
        os.fdatasync(file.fileno())
    time.sleep(0.06)
    if not seen(path).is_local or seen(path).unsure:
        pytest.skip("the filesystem is not one that says which pages are dirty")
    return path


def swap(path, content):
    """Put another file of the same time in the place of one."""
    time = path.stat().st_mtime_ns
    new = path.with_name("new")
    new.write_bytes(content)
    os.utime(new, ns=(time, time))
    new.replace(path)


def test_only_the_ranges_with_dirty_pages_are_unsure(tmp_path):
    path = settled(tmp_path / "file", BIG)
    with path.open("r+b") as file:
        file.seek(STEP + 5)
        file.write(b"x")
        file.flush()
        time.sleep(0.06)
        assert seen(path).unsure in {
            ((STEP, 2 * STEP),),
            (),
        }  # the second if the kernel was quick to write it
        os.fdatasync(file.fileno())
    assert seen(path).unsure == ()


def test_a_file_that_has_just_changed_is_unsure(tmp_path):
    now = time.time_ns()
    path = settled(tmp_path / "file", 8)
    with open_source(path) as source:
        for changed, is_sure in (
            (now - 10**9 + 1, True),
            (time.time_ns(), False),
            (now // 10**9 * 10**9, False),
        ):
            source.version = FileIdentity(1, 2, 8, changed, changed)
            assert (page_cache.look_at(source).unsure == ()) is is_sure


def test_where_the_kernel_cannot_say_what_is_dirty_it_is_what_is_in_memory(tmp_path, monkeypatch):
    """It cannot before Linux 6.5, and may not in some containers."""
    path = settled(tmp_path / "file", 8)
    monkeypatch.setattr(page_cache, "_CACHESTAT", 100_000)
    assert seen(path) == InputFile(seen(path).identity, is_known=False)
    with watching() as looked:
        read_bytes(path)
    check(looked.inputs(), {})
    assert not changed_times(looked.inputs())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[0] = 1
        known = looked.inputs().files[str(path)]
        now = Inputs({str(path): replace(known, identity=identity_at(str(path)))}, looked.inputs().readings)
        with open_source(path) as source:
            if range_digest(source, 0, 8, cached_only=True) is None:
                pytest.skip("the filesystem does not say what is in memory")
        with pytest.raises(ChangedError):
            check(now, {})


def test_of_a_filesystem_in_memory_everything_is_unsure():
    if page_cache._filesystem(os.open("/dev/shm", os.O_RDONLY)) != 0x01021994:
        pytest.skip("there is none")
    path = Path(f"/dev/shm/lora-merge-{os.getpid()}")
    path.write_bytes(bytes(8))
    try:
        assert seen(path) == InputFile(seen(path).identity, ((0, 8),))
    finally:
        path.unlink()


def test_an_inode_is_asked_for_on_local_filesystems_only():
    """Filesystems in programs (FUSE) number their files anew when they are opened again."""
    then, now = FileIdentity(1, 2, 3, 4, 5), FileIdentity(1, 9, 3, 4, 5)
    assert not InputFile(then).may_be(now)
    assert InputFile(then, is_local=False).may_be(now)
    assert not InputFile(then, is_local=False).may_be(FileIdentity(1, 2, 3, 9, 5))
    files = [Inputs({"x": InputFile(each, is_local=False)}) for each in (then, now)]
    assert lasting(files[0]) == lasting(files[1])


def test_another_file_under_the_name_is_noticed_when_it_is_opened(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with watching():
        read_bytes(path)
        swap(path, b"new")
        with pytest.raises(ChangedError, match="changed while it was read"):
            read_bytes(path)
    read_bytes(path)


def test_other_bytes_in_the_file_are_noticed_when_they_are_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    time = path.stat().st_mtime_ns
    with watching():
        read_bytes(path)
        path.write_bytes(b"new")
        os.utime(path, ns=(time, time))
        with pytest.raises(ChangedError):
            read_bytes(path)


def test_a_thread_tells_the_watch_that_it_is_given_and_what_it_read_is_taken_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with watching() as seen:
        read_bytes(path)
    watch = Watch(seen.inputs(), is_closed=True)

    def read_watched():
        with told(watch):
            return read_bytes(path)

    watch.taken()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(read_watched).result() == b"old"
        assert {place.file for place in watch.taken()} == {str(path)}
        assert watch.taken() == {}
        swap(path, b"new")
        with pytest.raises(ChangedError):
            pool.submit(read_watched).result()


def test_of_what_is_known_other_files_are_nobodys_business(tmp_path):
    """A run reads its own output, which changes."""
    known, own = tmp_path / "known", tmp_path / "own"
    for path in (known, own):
        path.write_bytes(b"old")
    with watching() as seen:
        read_bytes(known)
    with watching(seen.inputs()) as later:
        read_bytes(own)
        swap(own, b"new")
        read_bytes(own)
        swap(known, b"new")
        with pytest.raises(ChangedError):
            read_bytes(known)
    assert later.inputs() == seen.inputs()


def test_runs_that_know_different_files_under_a_name_have_no_common_input(tmp_path):
    path = tmp_path / "file"
    known = []
    for content in (b"old", b"new"):
        path.write_bytes(content) if not known else swap(path, content)
        with watching() as seen:
            read_bytes(path)
        known.append(seen.inputs())
    with pytest.raises(ChangedError), watching(*known):
        pass


@pytest.mark.parametrize("is_local", [True, False])
def test_at_the_end_bytes_decide_where_only_the_time_of_change_has_moved(tmp_path, is_local, monkeypatch):
    if not is_local:
        monkeypatch.setattr(page_cache, "_TIMED", frozenset())
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with watching() as seen:
        read_bytes(path)
    time = path.stat().st_mtime_ns
    path.chmod(0o600)
    os.link(path, tmp_path / "second")
    check(seen.inputs(), {})
    path.write_bytes(b"new")
    os.utime(path, ns=(time, time))
    with pytest.raises(ChangedError):
        check(seen.inputs(), {})


@pytest.mark.parametrize("is_local", [True, False])
def test_at_the_end_another_file_of_the_same_size_and_time_is_noticed(tmp_path, is_local, monkeypatch):
    if not is_local:
        monkeypatch.setattr(page_cache, "_TIMED", frozenset())
        monkeypatch.setattr(page_cache, "_UNTIMED", frozenset())
        monkeypatch.setattr(page_cache, "_is_young", lambda identity, now: False)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with watching() as seen:
        read_bytes(path)
    assert seen.inputs().files[str(path)].is_local is is_local
    swap(path, b"new")
    with pytest.raises(ChangedError):
        check(seen.inputs(), {})


def test_what_the_page_cache_has_is_read_without_the_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with open_source(path) as source:
        whole = range_digest(source, 2, 5)
        assert range_digest(source, 2, 5, cached_only=True) in {
            whole,
            None,
        }  # None where the kernel cannot tell
        assert range_digest(source, 8, 5, cached_only=True) is None


def test_two_files_are_compared_anew_whatever_their_times_say(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(b"old")
    assert same_bytes(one, other)
    time = one.stat().st_mtime_ns
    one.write_bytes(b"new")
    os.utime(one, ns=(time, time))
    assert not same_bytes(one, other)


def test_a_change_of_our_own_is_taken_over_where_the_file_was_the_one_that_is_known():
    """A hard link moves the time of change of the file that gets a second name."""
    before, after, other = (FileIdentity(1, 2, 3, 4, changed) for changed in (5, 6, 7))
    inputs = Inputs({"x": InputFile(before)})
    assert inputs.renewed("x", before, after).files["x"].identity == after
    assert inputs.renewed("x", other, after) == inputs
    assert inputs.renewed("y", before, after) == inputs
