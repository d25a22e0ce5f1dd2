"""Inputs that change while a run reads them: another file under the name, other bytes in the file, whatever its times say."""

from __future__ import annotations

import json
import mmap
import os
import shutil
from pathlib import Path

import pytest

import lora_merge
from lora_merge.batches.batch_file import read_batch
from lora_merge.batches.run import Batch
from lora_merge.core.report import Silence
from lora_merge.errors import ChangedError
from lora_merge.formats.safetensors import read_header
from lora_merge.planning import run
from lora_merge.storage import page_cache
from lora_merge.storage.sources import open_source
from tests.tampering import edit_json, to_pickles

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FILES = (
    "base/model-00003-of-00003.safetensors", "base/model.safetensors.index.json", "base/config.json",
    "base/tokenizer.json", "base/chat_template.jinja", f"adapter/{WEIGHTS}", f"adapter/{CONFIG}",
)  # fmt: skip


@pytest.fixture
def place(pico, pico_adapter, tmp_path):
    """A folder with copies of a base in three shards and of an adapter."""
    base = pico(max_shard_size="60KB")
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(pico_adapter(base), tmp_path / "adapter")
    return tmp_path


def content(root):
    """What is in an output, by name; but for its card, which has the output's name in it."""
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != "README.md"}


class Hook(Silence):
    """Does something once, when a phase begins or the first tensor in it is done."""

    def __init__(self, act, phase="merging", when="begun"):
        self._act, self._phase, self._when = act, phase, when
        self._now, self.n_acts = "", 0

    def phase(self, name, total_bytes):
        self._now = name
        if self._when == "begun":
            self._strike()

    def done(self, name):
        if self._when in {"done", name}:
            self._strike()

    def _strike(self):
        if self._now == self._phase and not self.n_acts:
            self.n_acts += 1
            self._act()


def merge(place, out="out", observer=None, **options):
    return lora_merge.merge(
        base=place / "base", adapter=place / "adapter", out=place / out, observer=observer, **options
    )


def other_bytes(path):
    """The content of a file, changed in a way that leaves its size and its structure."""
    old = path.read_bytes()
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(old[:8], "little")
        return old[:start] + bytes(byte ^ 1 for byte in old[start:])
    if path.suffix == ".bin":
        return old.replace(b"\x3c", b"\x3b")
    return old.replace(b"  ", b" \t") if b"  " in old else old.replace(b"content", b"Content")


def by_rename(path, how=other_bytes):
    """Another file of the same size and the same time of modification takes the name."""
    new, time = path.with_name("new"), path.stat().st_mtime_ns
    new.write_bytes(how(path))
    os.utime(new, ns=(time, time))
    assert new.read_bytes() != path.read_bytes()
    new.replace(path)


def in_place(path, how=other_bytes):
    """The bytes are written over, and the time of modification is set back."""
    time = path.stat().st_mtime_ns
    new = how(path)
    assert new != path.read_bytes()
    with path.open("r+b") as file:
        file.write(new)
    os.utime(path, ns=(time, time))


HOW = (by_rename, in_place)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("name", "level"), [*((name, "none") for name in FILES), (FILES[0], "sample"), (FILES[0], "full")]
)
def test_a_file_that_changes_during_the_merge_is_noticed(place, name, how, level):
    hook = Hook(lambda: how(place / name))
    with pytest.raises(ChangedError, match="changed while it was read"):
        merge(place, observer=hook, verify=level)
    assert hook.n_acts == 1
    assert not (place / "out").exists()
    assert not list(place.glob("*staging*"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_changes_between_its_header_and_the_plan_is_noticed(place, name, how, monkeypatch):
    plan = run.make_plan

    def changed_first(*arguments):
        how(place / name)
        return plan(*arguments)

    monkeypatch.setattr(run, "make_plan", changed_first)
    try:
        merge(place)
    except ChangedError:
        assert not (place / "out").exists()
        return
    assert how is in_place
    assert name == FILES[0]  # only its header was read before the change, and that is the same
    monkeypatch.undo()
    merge(place, "again")
    assert content(place / "again") == content(place / "out")


def test_a_configuration_that_changes_before_the_weights_are_read_is_noticed(place, monkeypatch):
    read = run.resolve_base

    def changed_first(*arguments):
        by_rename(place / "adapter" / CONFIG)
        return read(*arguments)

    monkeypatch.setattr(run, "resolve_base", changed_first)
    with pytest.raises(ChangedError):
        merge(place)


@pytest.mark.parametrize("phase", ["copying", "verifying", "flushing"])
@pytest.mark.parametrize("name", [FILES[0], FILES[-2]])
def test_at_any_moment_the_output_is_of_one_state_or_there_is_none(place, name, phase):
    merge(place, "old")
    hook = Hook(lambda: by_rename(place / name), phase)
    try:
        merge(place, observer=hook)
    except lora_merge.LoraMergeError:
        assert not (place / "out").exists()
    else:
        assert content(place / "out") == content(place / "old")
    assert hook.n_acts == 1


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["base/pytorch_model-00003-of-00003.bin", "adapter/adapter_model.bin"])
def test_pickles_are_watched_as_well(place, name, how):
    for folder in ("base", "adapter"):
        to_pickles(place / folder)
    with pytest.raises(ChangedError):
        merge(place, observer=Hook(lambda: how(place / name)))


def rows_of(path, tensor, change=1):
    """Flip a bit of every value of one tensor."""

    def changed(path):
        ref = next(ref for ref in read_header(path).tensors if ref.name == tensor)
        old = path.read_bytes()
        flipped = bytes(byte ^ change for byte in old[ref.start : ref.end])
        return old[: ref.start] + flipped + old[ref.end :]

    return changed(path)


def test_rows_that_were_merged_already_are_noticed(place):
    """What is merged of a tensor has a digest of what was read."""
    name, path = merged_tensor(place)
    hook = Hook(lambda: in_place(path, lambda path: rows_of(path, name)), when=name)
    with pytest.raises(ChangedError):
        merge(place, observer=hook, verify="none")
    assert hook.n_acts == 1


def merged_tensor(place):
    """The name of a tensor that the adapter changes, and the file that holds it."""
    index = json.loads((place / "base/model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in sorted(index) if name.endswith("q_proj.weight"))
    return name, place / "base" / index[name]


@pytest.mark.parametrize("level", ["none", "sample", "full"])
@pytest.mark.parametrize("memory", [False, True], ids=["disk", "tmpfs"])
def test_a_write_through_a_mapping_changes_no_time_and_is_noticed(place, level, memory, request):
    """Of a page that is dirty already the kernel sees no write."""
    if memory:
        root = Path("/dev/shm") / f"lora-merge-{os.getpid()}-{level}"
        if not root.parent.is_dir():
            pytest.skip("there is no filesystem in memory")
        request.addfinalizer(lambda: shutil.rmtree(root))
        for folder in ("base", "adapter"):
            shutil.copytree(place / folder, root / folder)
        place = root
    name, path = merged_tensor(place)
    ref = next(ref for ref in read_header(path).tensors if ref.name == name)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[ref.start] ^= 1  # dirty from now on
        with open_source(path) as source:
            if not page_cache.look_at(source).unsure:
                pytest.skip("the filesystem is not one that says which pages are dirty")
        before = path.stat()

        def write():
            mapping[ref.start + 2] ^= 1

        with pytest.raises(ChangedError):
            merge(place, observer=Hook(write, when=name), verify=level)
        after = path.stat()
        assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


def test_links_and_modes_that_others_change_meanwhile_are_no_changes(place):
    """Another merge with `--link hard`, a backup: they move the time of change, and the bytes are the same."""
    merge(place, "old")

    def touch_all():
        for path in [*(place / "base").iterdir(), *(place / "adapter").iterdir()]:
            os.link(path, place / f"backup-{path.name}")
            path.chmod(0o600)

    for level in ("none", "sample", "full"):
        hook = Hook(touch_all)
        merge(place, level, hook, verify=level, link="hard")
        assert hook.n_acts == 1
        assert content(place / level) == content(place / "old")
        for path in place.glob("backup-*"):
            path.unlink()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [FILES[0], FILES[2], FILES[-2], FILES[-1]])
def test_what_an_interrupted_run_read_of_other_inputs_is_not_gone_on_with(place, name, how):
    with pytest.raises(KeyboardInterrupt):
        merge(place, observer=Hook(interrupt, when="done"))
    how(place / name)
    report = merge(place, resume=True)
    assert name == FILES[0] or "not-resumed" in {issue.code for issue in report.issues}
    merge(place, "fresh")
    assert content(place / "out") == content(place / "fresh")


def test_an_interrupted_run_goes_on_after_links_and_modes_have_changed(place):
    with pytest.raises(KeyboardInterrupt):
        merge(place, observer=Hook(interrupt, when="done"))
    for path in (place / "base").iterdir():
        os.link(path, place / f"backup-{path.name}")
    report = merge(place, resume=True)
    assert "resumed" in {issue.code for issue in report.issues}
    merge(place, "fresh")
    assert content(place / "out") == content(place / "fresh")


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", [f"adapter/{WEIGHTS}", f"adapter/{CONFIG}"])
def test_an_adapter_that_changes_while_it_is_converted_is_noticed(place, name, how):
    hook = Hook(lambda: how(place / name), "making factors")
    with pytest.raises(ChangedError):
        lora_merge.convert(adapter=place / "adapter", out=place / "out", bake_scale=True, observer=hook)
    assert hook.n_acts == 1
    assert not (place / "out").exists()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["base", "tuned"])
def test_a_model_that_changes_while_a_lora_is_extracted_is_noticed(place, name, how):
    merge(place, "tuned")
    hook = Hook(
        lambda: how(merged_tensor(place)[1].parent.parent / name / merged_tensor(place)[1].name),
        "making factors",
    )
    with pytest.raises(ChangedError):
        lora_merge.extract(
            base=place / "base", tuned=place / "tuned", out=place / "out", rank=4, observer=hook
        )
    assert hook.n_acts == 1
    assert not (place / "out").exists()


def test_a_base_that_changes_while_an_output_is_verified_is_noticed(place):
    merge(place, "out")
    hook = Hook(lambda: by_rename(place / FILES[0]), "recomputing")
    with pytest.raises(ChangedError):
        lora_merge.verify(out=place / "out", observer=hook)
    assert hook.n_acts == 1


@pytest.mark.parametrize("how", HOW)
def test_outputs_of_a_batch_are_of_one_state_of_their_base(place, how):
    shutil.copytree(place / "adapter", place / "second")
    edit_json(place / "second" / CONFIG, lora_alpha=3)
    jobs = [
        {"adapter": str(place / name), "out": str(place / f"out-{name}")} for name in ("adapter", "second")
    ]
    (place / "batch.yaml").write_text(json.dumps({"defaults": {"base": str(place / "base")}, "jobs": jobs}))
    hook = BatchHook(lambda: how(place / FILES[0]))
    report = batch(place, hook)
    assert hook.n_acts == 1
    assert {job.state for job in report.jobs} <= {"failed", "not run"}
    assert not list(place.glob("out-*"))


def batch(place, hook):
    running = Batch(read_batch(str(place / "batch.yaml")), hook)
    running.run()
    return running.report("batch.yaml")


class BatchHook(Hook):
    def job(self, name, state, sentence=""):
        del name, state, sentence
