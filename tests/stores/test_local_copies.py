"""Local copies of small files: their names and versions, what is copied once, and when the folder goes."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest

import lora_merge
from lora_merge.core.report import Issue, Silence
from lora_merge.errors import ChangedError, CheckpointError, PlanError, ResolveError
from lora_merge.runtime.temporary import folder_for, remove_folders, temporary_folder
from lora_merge.storage.input_files import watching
from lora_merge.storage.local_copies import in_store, local_path, without_copies
from lora_merge.storage.objects import StoreUrl, store_at
from lora_merge.storage.objects.local_copies import local_copy
from lora_merge.storage.reading import read_into
from lora_merge.storage.shown import by_url, errors_by_url
from lora_merge.storage.sources import open_source, version_at
from tests.faults.odd_values import make_adapter, make_base


class Heard(Silence):
    """Hears what is copied."""

    def __init__(self):
        self.phases, self.nbytes = [], 0

    def phase(self, name, total_bytes):
        self.phases.append((name, total_bytes))

    def advance(self, nbytes):
        self.nbytes += nbytes


@pytest.fixture
def filled(url, store):
    """Return the URL of a folder with three files."""
    for name, data in (("config.json", b"{}"), ("sub/a.json", b"[1]"), ("empty", b"")):
        store.put(name, data)
    return url


def test_what_is_asked_for_is_copied_once(filled):
    heard = Heard()
    copy = local_copy(filled, heard)
    root = copy.fetch({"config.json", "sub/a.json", "empty"})
    assert root.name == filled.prefix.rpartition("/")[2]
    assert {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()} == {
        "config.json": b"{}", "sub/a.json": b"[1]", "empty": b"",
    }  # fmt: skip
    assert heard.phases == [(f"downloading {filled}", 5)]
    assert heard.nbytes == 5
    again = local_copy(filled, heard)
    assert again is copy
    again.fetch({"config.json"})
    assert len(heard.phases) == 1


def test_a_copied_file_is_opened_by_its_url_and_has_the_stores_version(filled):
    text = filled.child("config.json")
    before = version_at(text)
    copy = local_copy(filled, Silence())
    copy.fetch({"config.json"})
    with open_source(text) as source:
        buffer = memoryview(bytearray(2))
        read_into(source, buffer, 0)
        assert (source.text, source.version, source.fd, bytes(buffer)) == (text, before, None, b"{}")
    assert local_path(text) == copy.root / "config.json"
    assert local_path(str(filled)) == copy.root
    assert in_store(str(filled)) == (str(filled), copy.names)
    # What was not copied is read in the store.
    with open_source(filled.child("sub/a.json")) as source:
        assert source.nbytes == 3


def test_another_version_makes_another_copy(filled, store):
    first = local_copy(filled, Silence())
    old = first.fetch({"config.json"})
    store.put("config.json", b'{"a": 1}')
    second = local_copy(filled, Silence())
    assert second is not first
    assert (second.fetch({"config.json"}) / "config.json").read_bytes() == b'{"a": 1}'
    assert (old / "config.json").read_bytes() == b"{}"
    assert by_url((str(old), str(second.root))) == (str(filled), str(filled))


def test_a_run_that_has_read_one_version_refuses_another(filled, store):
    with watching() as seen:
        local_copy(filled, Silence()).fetch({"config.json"})
    gc.collect()
    store.put("config.json", b'{"a": 1}')
    with watching(seen.inputs()), pytest.raises(ChangedError) as caught:
        local_copy(filled, Silence()).fetch({"config.json"})
    assert str(caught.value).startswith(filled.child("config.json"))


def test_inputs_have_urls_and_versions_of_the_store(filled):
    copy = local_copy(filled, Silence())
    with watching() as seen:
        copy.fetch({"config.json"})
        with open_source(copy.root / "config.json") as source:
            read_into(source, memoryview(bytearray(2)), 0)
    inputs = without_copies(seen.inputs())
    text = filled.child("config.json")
    assert set(inputs.files) == {text}
    assert inputs.files[text].identity == version_at(text)
    assert without_copies(inputs) == inputs


def test_the_folder_goes_with_the_last_reference(filled):
    copy = local_copy(filled, Silence())
    home = copy.home
    copy.fetch({"config.json"})
    assert home.is_dir()
    del copy
    gc.collect()
    assert not home.exists()
    with pytest.raises(ResolveError, match="is not on this machine"):
        local_path(filled.child("config.json"))


def test_nothing_stored_is_one_sentence(url):
    with pytest.raises(ResolveError) as caught:
        local_copy(url, Silence())
    assert str(url) in str(caught.value)


def test_a_sibling_folder_is_copied_beside(url):
    own = StoreUrl(url.scheme, url.bucket, f"{url.prefix}/run/checkpoint-5")
    store_at(own).put("adapter_config.json", b"{}")
    store_at(StoreUrl(url.scheme, url.bucket, f"{url.prefix}/run/extra_states")).put("x.safetensors", b"1234")
    copy = local_copy(own, Silence())
    assert copy.beside("extra_states") == {"../extra_states/x.safetensors"}
    root = copy.fetch({"adapter_config.json", *copy.beside("extra_states")})
    beside = root.parent / "extra_states" / "x.safetensors"
    assert beside.read_bytes() == b"1234"
    assert by_url(str(beside)) == f"{url}/run/extra_states/x.safetensors"
    with open_source(by_url(str(beside))) as source:
        assert source.fd is None
        assert source.nbytes == 4


def test_a_full_disk_is_told_with_the_url(filled, monkeypatch):
    import errno

    def full(self, *arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    copy = local_copy(filled, Silence())
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResolveError) as caught:
        copy.fetch({"config.json"})
    assert (
        f"{filled.child('config.json')}: cannot be copied to this machine (No space left on device)"
        in str(caught.value)
    )
    assert "TMPDIR" in caught.value.hint


@dataclass(frozen=True, slots=True)
class Value:
    """A value with paths in it."""

    path: str
    several: tuple[str, ...]
    table: dict[str, str]
    number: int = 3


def test_every_text_of_a_value_is_renamed(filled):
    copy = local_copy(filled, Silence())
    here, there = str(copy.root), str(filled)
    value = Value(f"{here}/a", (f"see {here}",), {here: f"'{here}/b'"})
    assert by_url(value) == Value(f"{there}/a", (f"see {there}",), {there: f"'{there}/b'"})
    other = Value("/a", (), {})
    assert by_url(other) is other


def test_errors_name_urls_and_whoever_filled_the_store(filled):
    copy = local_copy(filled, Silence())
    path = str(copy.root / "config.json")
    with pytest.raises(CheckpointError) as caught, errors_by_url():
        raise CheckpointError(path, "x", "is broken", hint="download the file again: it is truncated")
    assert str(caught.value) == f"{filled.child('config.json')}: x: is broken"
    assert caught.value.file == filled.child("config.json")
    assert caught.value.hint == "upload the file again: it is truncated"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.raises(PlanError) as problems, errors_by_url():
        raise PlanError([Issue("error", "x", path, "is wrong")])
    assert problems.value.issues[0].subject == filled.child("config.json")
    with pytest.raises(ResolveError, match=r"^/a: ") as plain, errors_by_url():
        raise ResolveError("/a: is broken", hint="download it again")
    assert plain.value.hint == "download it again"


class Owner:
    """Owns a folder."""


def test_folders_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owner = Owner()
    kept = folder_for(owner)
    dead = tmp_path / "lora-merge-copy-dead"
    (dead / "files").mkdir(parents=True)
    (dead / ".lock").touch()
    young = tmp_path / "lora-merge-copy-young"  # made, and not locked yet
    young.mkdir()
    other = folder_for(Owner())
    assert not other.exists()  # its owner is gone already
    assert kept.is_dir()
    assert not dead.exists()
    assert young.is_dir()
    remove_folders()
    assert not kept.exists()


def test_a_kill_while_a_folder_is_removed_leaves_its_lock_to_the_next_process(tmp_path, monkeypatch):
    import shutil
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / "lora-merge-copy-dead"
    (dead / "files" / "more").mkdir(parents=True)
    (dead / ".lock").touch()

    class Killed(BaseException):
        """Ends a process in the middle of a removal."""

    def removed(path, **_):
        (path / "more").rmdir()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", removed)
        # `raises` would keep the traceback, and with it the lock.
        with contextlib.suppress(Killed):
            folder_for(Owner())
    assert (dead / ".lock").exists()
    folder_for(Owner())
    assert not dead.exists()


def test_a_run_with_nothing_to_do_removes_what_a_killed_one_has_left(tmp_path, monkeypatch):
    import tempfile

    base, adapter, spools = (
        make_base(tmp_path / "base"),
        make_adapter(tmp_path / "adapter"),
        tmp_path / "spools",
    )
    spools.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spools))
    asked = {"base": str(base), "adapter": str(adapter), "out": str(tmp_path / "out"), "resume": True}
    lora_merge.merge(**asked)
    dead = spools / "lora-merge-copy-dead"
    (dead / "files").mkdir(parents=True)
    (dead / ".lock").touch()
    assert lora_merge.merge(**asked).was_complete
    assert not dead.exists()


def test_the_folder_of_a_block_goes_with_the_block_and_no_other_does(tmp_path):
    with temporary_folder(tmp_path) as kept:
        with pytest.raises(ValueError, match="of the block"), temporary_folder(tmp_path) as folder:  # noqa: PT012
            (folder / "file").touch()
            raise ValueError("of the block")
        assert [path / "files" for path in tmp_path.iterdir()] == [kept]
    assert not list(tmp_path.iterdir())
