"""What has come under the output's name meanwhile is never removed; what is published is what was written."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat

import pytest

from lora_merge.core.tensor import TensorRecord
from lora_merge.errors import WriteError
from lora_merge.storage import dirs, owners, publish, staging
from lora_merge.storage.folder import Folder
from lora_merge.storage.journal import Journal

RECORD = TensorRecord("x", "model.safetensors", 8, "xxh3_128:01", finite=True)


@contextlib.contextmanager
def refusing(words):
    with pytest.raises(WriteError, match=words) as caught:
        yield caught


def fill(path, text, name="config.json"):
    path.mkdir(exist_ok=True)
    (path / name).write_text(text)
    return path


def thesis(path):
    return fill(path, "the only copy", "thesis.txt")


@pytest.fixture(params=[True, False], ids=["in one step", "in two steps"])
def renames(request, monkeypatch):
    """Both ways to name an output: the kernel's own, and what is left where there is none."""
    if not request.param:
        monkeypatch.setattr(publish, "renamed", lambda one, other, flag: False)


def refused(out, happens, *, overwrite, words):
    """Publish after something has happened; the work stays for a run that resumes."""
    with (
        refusing(words) as caught,
        staging.staging(out, overwrite=overwrite) as stage,
        Journal(stage.home, "this merge", [RECORD]),
    ):
        fill(stage.output, "new")
        happens()
        staging.publish(stage)
    assert ["1 finished tensor kept" in note for note in caught.value.__notes__] == [True]
    assert (staging.staging_path(out) / "output" / "config.json").read_text() == "new"


APPEARING = {
    "a directory": thesis,
    "another model": lambda out: fill(thesis(out), "{}"),
    "a file": lambda out: out.write_text("the only copy"),
    "a link to a directory": lambda out: out.symlink_to(thesis(out.with_name("elsewhere"))),
    "a link to an empty directory": lambda out: out.symlink_to(out.parent),
    "a link to nowhere": lambda out: out.symlink_to("nowhere"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("what", APPEARING)
def test_what_appears_under_the_name_of_an_output_stays(what, overwrite, renames, tmp_path):
    out = tmp_path / "out"

    refused(
        out,
        lambda: APPEARING[what](out),
        overwrite=overwrite,
        words="already exists: another program created or changed it",
    )

    if what.startswith("a link"):
        assert out.is_symlink()
    for path in [
        path for path in (out / "thesis.txt", tmp_path / "elsewhere" / "thesis.txt") if path.exists()
    ]:
        assert path.read_text() == "the only copy"
    assert (out / "thesis.txt").exists() == (
        what in {"a directory", "another model", "a link to a directory"}
    )
    assert out.is_file() == (what == "a file")


@pytest.mark.parametrize("what", APPEARING)
def test_what_takes_the_place_of_the_output_that_was_to_be_replaced_stays(what, renames, tmp_path):
    out = fill(tmp_path / "out", "old")

    def happens():
        out.rename(tmp_path / "moved")
        APPEARING[what](out)

    refused(out, happens, overwrite=True, words="already exists: another program created or changed it")

    assert (tmp_path / "moved" / "config.json").read_text() == "old"
    assert os.path.lexists(out)
    assert (out / "thesis.txt").exists() == (
        what in {"a directory", "another model", "a link to a directory"}
    )


def test_another_model_with_the_inode_of_the_one_that_was_to_be_replaced_stays(renames, tmp_path):
    """A filesystem gives the number of a directory that is gone to the next one; what is held open keeps it."""
    out = fill(tmp_path / "out", "old")

    def happens():
        shutil.rmtree(out)
        fill(thesis(out), "{}")

    refused(out, happens, overwrite=True, words="already exists")
    assert (out / "thesis.txt").read_text() == "the only copy"


def test_an_output_that_is_a_model_no_more_is_not_replaced(renames, tmp_path):
    out = fill(tmp_path / "out", "old")

    def happens():
        (out / "config.json").unlink()
        thesis(out)

    refused(out, happens, overwrite=True, words="already exists")
    assert (out / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("name", ["thesis.txt", "deep/thesis.txt", "config.json"])
def test_what_comes_into_the_output_that_was_to_be_replaced_stays(name, renames, tmp_path):
    out = fill(tmp_path / "out", "old")
    (out / "deep").mkdir()

    refused(
        out, lambda: (out / name).write_text("the only copy"), overwrite=True, words="created or changed it"
    )
    assert (out / name).read_text() == "the only copy"
    with staging.staging(out, overwrite=True, resume=True) as stage:  # now it is what the check has seen
        staging.publish(stage)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("n", [1, 2])
def test_what_appears_between_the_look_and_the_exchange_is_put_back(n, tmp_path, monkeypatch):
    out = fill(tmp_path / "out", "old")
    real, calls = publish.renamed if n == 1 else os.rename, 0

    def late(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == 1:
            real_rename(out, tmp_path / "moved")
            thesis(out)
        return real(*arguments, **named)

    real_rename = os.rename

    def happens():
        if n == 1:
            monkeypatch.setattr(publish, "renamed", late)
        else:
            monkeypatch.setattr(publish, "renamed", lambda one, other, flag: False)
            monkeypatch.setattr(os, "rename", late)

    refused(out, happens, overwrite=True, words="already exists")
    assert (out / "thesis.txt").read_text() == "the only copy"
    assert (tmp_path / "moved" / "config.json").read_text() == "old"


def test_what_cannot_be_put_back_is_kept_and_named(tmp_path, monkeypatch):
    out = fill(tmp_path / "out", "old")
    real, calls = publish.renamed, 0

    def once(one, other, flag):
        nonlocal calls
        calls += 1
        if calls == 1:
            out.rename(tmp_path / "moved")
            thesis(out)
            return real(one, other, flag)
        return False

    monkeypatch.setattr(publish, "renamed", once)
    with (
        refusing(r"the previous directory is .*kept"),
        staging.staging(out, overwrite=True) as stage,
    ):
        fill(stage.output, "new")
        staging.publish(stage)
    kept = staging.staging_path(out) / "kept" / "thesis.txt"
    assert kept.read_text() == "the only copy"
    with (
        refusing("contains other files: kept"),
        staging.staging(out, overwrite=True),
    ):
        pass
    assert kept.read_text() == "the only copy"


def test_an_empty_directory_takes_the_output(renames, tmp_path):
    out = tmp_path / "out"
    with staging.staging(out) as stage:
        fill(stage.output, "new")
        out.mkdir()
        staging.publish(stage)
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_that_goes_away_while_it_is_to_be_replaced_is_no_fault(renames, tmp_path):
    out = fill(tmp_path / "out", "old")
    with staging.staging(out, overwrite=True) as stage:
        fill(stage.output, "new")
        shutil.rmtree(out)
        staging.publish(stage)
    assert (out / "config.json").read_text() == "new"


@pytest.mark.parametrize("state", ["taken away", "named", "in doubt"])
def test_a_run_that_was_killed_between_two_renames_is_put_right(state, tmp_path):
    out, home = tmp_path / "out", staging.staging_path(tmp_path / "out")
    home.mkdir()
    fill(home / "replaced", "old")
    if state != "named":
        fill(home / "output", "new")
    if state != "taken away":
        fill(out, "new")
    if state == "in doubt":
        with (
            refusing(r"replaced: is an earlier .*out"),
            staging.staging(out, overwrite=True),
        ):
            pass
        assert (home / "replaced" / "config.json").read_text() == "old"
        return
    with staging.staging(out, overwrite=True, resume=True):
        assert not (home / "replaced").exists()
        assert (out / "config.json").read_text() == ("old" if state == "taken away" else "new")
    assert not home.exists()


def test_a_directory_that_takes_the_place_of_the_staged_one_is_not_published(tmp_path):
    out = tmp_path / "out"

    def happens():
        home = staging.staging_path(out)
        (home / "output").rename(tmp_path / "stolen")
        fill(home / "output", "theirs")

    with (
        refusing("another program replaced the directory of this run"),
        staging.staging(out) as stage,
    ):
        fill(stage.output, "new")
        happens()
        staging.publish(stage)
    assert not out.exists()


def test_a_directory_that_takes_its_place_after_the_flush_is_not_published_either(tmp_path, monkeypatch):
    out, flush = tmp_path / "out", Folder.flush

    def late(folder):
        flush(folder)
        folder.path.rename(tmp_path / "stolen")
        fill(folder.path, "theirs")

    monkeypatch.setattr(Folder, "flush", late)
    with refusing("no output was created"), staging.staging(out) as stage:
        fill(stage.output, "new")
        staging.publish(stage)
    assert not out.exists()


def test_a_staging_directory_that_is_replaced_takes_nothing_with_it(tmp_path):
    out, home = tmp_path / "out", staging.staging_path(tmp_path / "out")
    with (
        refusing("another program replaced the directory of this run"),
        staging.staging(out) as stage,
    ):
        home.rename(tmp_path / "ours")
        home.symlink_to(thesis(tmp_path / "elsewhere"))
        (tmp_path / "elsewhere" / "output").mkdir()
        thesis(tmp_path / "elsewhere" / "output")
        for write in (
            lambda: stage.folder.write_text("README.md", "new"),
            stage.folder.clear,
            lambda: stage.home.remove("thesis.txt"),
            lambda: Journal(stage.home, "this merge"),
        ):
            with refusing("another program replaced"):
                write()
        staging.publish(stage)
    assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*")) == [
        "output",
        "thesis.txt",
        "thesis.txt",
    ]


# ------------------------------------------------------------------------------------------ whose it is


@pytest.mark.parametrize("resume", [False, True])
def test_a_staging_directory_that_others_may_write_is_refused(resume, tmp_path):
    home = staging.staging_path(tmp_path / "out")
    thesis(home).chmod(0o777)

    with (
        refusing(r"other users can write to it \(mode 0777\)"),
        staging.staging(tmp_path / "out", resume=resume),
    ):
        pass
    assert stat.S_IMODE(home.stat().st_mode) == 0o777
    assert (home / "thesis.txt").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_of_this_name_that_no_run_made_is_not_cleared(resume, tmp_path):
    home = thesis(staging.staging_path(tmp_path / "out"))

    with (
        refusing(r"contains other files: thesis\.txt"),
        staging.staging(tmp_path / "out", resume=resume),
    ):
        pass
    assert (home / "thesis.txt").read_text() == "the only copy"


def test_staging_is_closed_to_others_until_the_output_has_its_name(tmp_path):
    out = tmp_path / "out"
    for _ in range(2):
        with staging.staging(out, resume=True) as stage:
            assert stat.S_IMODE(stage.root.stat().st_mode) == 0o700
            fill(stage.output, "new")
            staging.publish(stage)
        shutil.rmtree(out)
        (staging.staging_path(out)).mkdir(mode=0o755)


def test_a_filesystem_that_shows_one_owner_and_one_mode_for_all_is_used(tmp_path, monkeypatch):
    """As vfat, drvfs and shares of other systems do; what a file made just now shows is what counts."""
    real, home = os.fstat, staging.staging_path(tmp_path / "out")
    home.mkdir()

    def fstat(fd):
        fields = list(real(fd))
        fields[0] |= 0o777
        fields[4] = 4242
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", fstat)
    with staging.staging(tmp_path / "out") as stage:
        fill(stage.output, "new")
        staging.publish(stage)
    monkeypatch.undo()
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("place", ["staging", "output"])
@pytest.mark.parametrize("what", ["a link", "a file", "a pipe"])
def test_what_stands_in_the_place_of_a_directory_is_never_followed(what, place, resume, tmp_path):
    out, victim = tmp_path / "out", thesis(tmp_path / "elsewhere")
    path = staging.staging_path(out)
    if place == "output":
        path.mkdir()
        path /= "output"
    {
        "a link": lambda: path.symlink_to(victim),
        "a file": lambda: path.write_text(""),
        "a pipe": lambda: os.mkfifo(path),
    }[what]()

    if place == "staging":
        with refusing("is a link or a file"), staging.staging(out, resume=resume):
            pass
    else:
        with staging.staging(out, resume=resume) as stage:
            fill(stage.output, "new")
            staging.publish(stage)
        assert not out.is_symlink()
    assert (victim / "thesis.txt").read_text() == "the only copy"


# ------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("directory", "file", "umask", "wanted"),
    [
        (0o755, 0o644, 0o022, (0o755, 0o644)),
        (0o775, 0o664, 0o002, (0o775, 0o664)),
        (0o555, 0o444, 0o022, (0o755, 0o644)),
        (0o700, 0o644, 0o022, (0o700, 0o600)),
        (0o755, 0o600, 0o022, (0o700, 0o600)),
        (0o750, 0o640, 0o022, (0o750, 0o640)),
        (0o711, 0o644, 0o022, (0o700, 0o600)),
        (0o755, 0o644, 0o077, (0o700, 0o600)),
    ],
    ids=lambda value: oct(value) if isinstance(value, int) else "",
)
def test_who_may_not_read_the_base_may_not_read_the_output(directory, file, umask, wanted, tmp_path):
    base = fill(tmp_path / "base", "", "model.safetensors")
    (base / "model.safetensors").chmod(file)
    base.chmod(directory)
    before = os.umask(umask)
    try:
        with staging.staging(tmp_path / "out", inputs=(base, base / "model.safetensors")) as stage:
            stage.folder.write_text("model.safetensors", "")
            stage.folder.write_text("deep/config.json", "")
            staging.publish(stage)
    finally:
        os.umask(before)
        base.chmod(0o700)
    out = tmp_path / "out"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (out, out / "deep", *sorted(out.rglob("*.*")))]
    assert modes == [wanted[0], wanted[0], wanted[1], wanted[1]]


def test_a_group_that_may_read_the_base_is_not_any_group(tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "model.safetensors").chmod(0o640)
    group = (tmp_path / "model.safetensors").stat().st_gid

    assert owners.allowed_bits([tmp_path / "model.safetensors"], group) == 0o770
    assert owners.allowed_bits([tmp_path / "model.safetensors"], group + 1) == 0o700


def test_a_file_of_the_base_under_a_second_name_keeps_its_mode(tmp_path):
    (tmp_path / "shared").write_text("")
    (tmp_path / "shared").chmod(0o644)
    out = tmp_path / "out"
    out.mkdir()
    os.link(tmp_path / "shared", out / "model.safetensors")
    Folder.of(out).narrow(0o700)
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o644
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


# ------------------------------------------------------------------------------------- one file at a time


def planted(folder, what, victim):
    path = folder / "model.safetensors"
    match what:
        case "a link":
            path.symlink_to(victim)
        case "a second name":
            os.link(victim, path)
        case "a pipe":
            os.mkfifo(path)
        case "a directory":
            path.mkdir()


@pytest.mark.parametrize("what", ["a link", "a second name", "a pipe", "a directory"])
def test_only_a_file_of_the_run_itself_is_written_to(what, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("the only copy")
    folder = Folder.of(fill(tmp_path / "folder", ""))
    planted(folder.path, what, victim)

    with pytest.raises(WriteError), folder.writing("model.safetensors"):
        pass
    with pytest.raises(WriteError), folder.writing("model.safetensors", create=True):
        pass
    assert folder.read("model.safetensors") == (b"the only copy" if what == "a second name" else b"")
    folder.clear({"config.json"})
    assert [path.name for path in folder.path.iterdir()] == ["config.json"]
    assert victim.read_text() == "the only copy"


def test_a_link_on_the_way_to_a_file_is_not_followed(tmp_path):
    folder = Folder.of(fill(tmp_path / "folder", ""))
    (tmp_path / "folder" / "deep").symlink_to(thesis(tmp_path / "elsewhere"))
    for create in (True, False):
        with pytest.raises(WriteError), folder.writing("deep/thesis.txt", create=create):
            pass
        with pytest.raises(WriteError), folder.writing("deep/deeper/new", create=create):
            pass
    folder.clear()
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "elsewhere" / "thesis.txt").read_text() == "the only copy"


def test_a_link_in_the_output_is_not_published(tmp_path):
    with (
        refusing("was not written by this run"),
        staging.staging(tmp_path / "out") as stage,
    ):
        (stage.output / "config.json").symlink_to("/etc/passwd")
        staging.publish(stage)
    assert not (tmp_path / "out").exists()


def test_files_that_are_kept_keep_the_directories_that_they_are_in(tmp_path):
    root = tmp_path / "root"
    for name in ("a/b/kept", "a/gone", "c/gone", "d/e/f/gone"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    fd = dirs.open_directory(root)
    dirs.clear(fd, {"a/b/kept"})
    os.close(fd)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["a", "a/b", "a/b/kept"]
