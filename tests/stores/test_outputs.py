"""Outputs in stores: the bytes of a merge on a disk, one at a time, and nothing half done with a configuration."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
from dataclasses import replace

import pytest
import yaml

from lora_merge import api
from lora_merge.cli import exits
from lora_merge.errors import VerifyError, WriteError
from lora_merge.merging import staged
from lora_merge.storage import store_staging
from lora_merge.storage.destination import Wish
from lora_merge.storage.objects import StoreUrl, store_at
from lora_merge.storage.replaceable import SUFFIX
from lora_merge.storage.store_output import StoreDestination
from lora_merge.storage.store_staging import Run, StoreFiles, StoreStaging, beside
from tests.storages.reference import FIXTURES, adapted, by_library, everywhere, model_of
from tests.stores.conftest import SECRET
from tests.stores.merging import Merge, bytes_of, name_of, on_disk

DENSE = {
    "shards": {},
    "one file, in processes": {"max_shard_size": "1GB", "executor": "processes", "workers": 2},
    "quantised by the merge": {"quantize": "fp8-channel"},
}
QUANTISED = {"ct-int4": {"out_storage": "base"}, "ct-fp8-block": {"out_storage": "base"}, "ct-nvfp4": {}}


@pytest.fixture
def dense(pico, pico_adapter):
    """Return a function: options → a merge of a dense base in three shards."""
    base = pico("llama", "bfloat16", "60KB")
    return lambda **options: Merge(base, pico_adapter(base), options)


@pytest.fixture(scope="session")
def quantised(tmp_path_factory):
    """Return a function: fixture → a merge of it."""

    def build(name):
        root = tmp_path_factory.mktemp(name)
        model = model_of(by_library(name), FIXTURES / name, root / "dense")
        adapted(model, root / "adapter", **everywhere(name))
        return Merge(FIXTURES / name, root / "adapter", QUANTISED[name])

    return build


def merged(merge, url, **more):
    return api.merge(base=str(merge.base), adapter=str(merge.adapter), out=str(url), **merge.options, **more)


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_base_becomes_the_same_bytes_as_on_a_disk(name, dense, url, tmp_path):
    merge = dense(**DENSE[name])
    report = merged(merge, url)
    assert report.verdict.level == "sample"
    assert report.verdict.ok
    assert report.out == str(url)
    assert bytes_of(store_at(url)) == on_disk(merge, tmp_path, name_of(url))
    assert not store_at(beside(url)).entries()


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_base_becomes_the_same_bytes_as_on_a_disk(name, quantised, url, tmp_path):
    merge = quantised(name)
    assert merged(merge, url).verdict.ok
    assert bytes_of(store_at(url)) == on_disk(merge, tmp_path, name_of(url))


@pytest.mark.parametrize("name", ["dense", *QUANTISED])
def test_a_base_in_a_store_becomes_the_same_weights_as_one_on_a_disk(
    name, dense, quantised, url, upload, tmp_path
):
    merge = dense() if name == "dense" else quantised(name)
    base = StoreUrl(url.scheme, url.bucket, f"{url.prefix}-base")
    upload(merge.base, base)
    api.merge(base=str(base), adapter=str(merge.adapter), out=str(url), **merge.options)
    # Card and manifest name the base, which has another name here.
    told = ("README.md", "merge_manifest.json")
    found, wanted = bytes_of(store_at(url)), on_disk(merge, tmp_path, name_of(url))
    assert found.keys() == wanted.keys()
    assert [file for file in wanted if file not in told and found[file] != wanted[file]] == []
    assert not store_at(beside(url)).entries()


def test_every_value_of_an_output_is_verified_from_the_store(dense, url):
    report = merged(dense(), url, verify="full")
    assert report.verdict.level == "full"
    assert report.verdict.ok


@pytest.mark.parametrize("verify", ["sample", "full"])
def test_a_file_that_was_changed_in_the_store_fails_the_verification_and_all_of_it_goes(
    dense, url, verify, monkeypatch
):
    real = store_staging.StoreFiles.note

    def note(self, file, receipt, records):
        data = bytearray(store_at(url).get(file))
        data[-1] ^= 1
        store_at(url).put(file, bytes(data))
        real(self, file, receipt, records)

    monkeypatch.setattr(store_staging.StoreFiles, "note", note)
    with pytest.raises(VerifyError):
        merged(dense(), url, verify=verify)
    assert not store_at(url).entries()
    assert not store_at(beside(url)).entries()


def test_what_writes_into_a_file_after_its_verification_is_noticed(dense, url, monkeypatch):
    real = staged.check_strict

    def late(*arguments, **named):
        store = store_at(url)
        name = next(name for name in store.entries() if name.endswith(".safetensors"))
        store.put(name, store.get(name)[:-1] + b"!")
        real(*arguments, **named)

    monkeypatch.setattr(staged, "check_strict", late)
    with pytest.raises(WriteError, match="is not the file that this run has written"):
        merged(dense(), url)
    assert "config.json" not in store_at(url).entries()


def test_an_output_that_is_there_is_replaced_where_that_is_wanted(dense, url, tmp_path):
    store, merge = store_at(url), dense()
    old = {
        "config.json": b"{}",
        "merge_manifest.json": b"{}",
        "model-00009-of-00009.safetensors": b"old",
        "a/b.txt": b"",
    }
    for name, data in old.items():
        store.put(name, data)
    with pytest.raises(WriteError, match="already exists"):
        merged(merge, url)
    assert bytes_of(store) == old
    merged(merge, url, overwrite=True)
    assert bytes_of(store) == on_disk(merge, tmp_path, name_of(url))
    before = store.entries()
    assert merged(merge, url, resume=True).was_complete
    with pytest.raises(WriteError, match=r"this run may make something else: .*\(dtype\)"):
        merged(merge._replace(options={"dtype": "float32"}), url, resume=True)
    assert store.entries() == before


def test_a_prefix_that_holds_other_things_is_left_alone(dense, url):
    store_at(url).put("notes.txt", b"mine")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(WriteError, match="already exists and is not a model checkpoint"):
            merged(dense(), url, **options)
    assert bytes_of(store_at(url)) == {"notes.txt": b"mine"}
    assert not store_at(beside(url)).entries()


def test_one_run_has_the_prefix_and_the_error_says_which(dense, url):
    staging = store_at(beside(url))
    staging.put("run.json", Run("another", 4711, "node7", 0.0).text())
    with pytest.raises(
        WriteError,
        match=r"another merge has begun this output \(process 4711 on node7, begun [\d.]+ days ago\): it has other inputs",
    ):
        merged(dense(), url)
    with pytest.raises(WriteError, match="it has other inputs, options or versions") as caught:
        merged(dense(), url, resume=True)
    assert f"delete {beside(url)}/ and the weight files in {url}/" in caught.value.hint
    assert list(staging.entries()) == ["run.json"]


def test_a_lock_says_how_its_merge_differs_and_whether_its_process_still_runs(dense, url, tmp_path):
    merge = dense()
    merged(merge, url, part="1/2")
    other = tmp_path / "other"
    shutil.copytree(merge.base, other)
    for more in ({"part": "2/2"}, {}, {"resume": True}):
        with pytest.raises(WriteError) as caught:
            merged(merge._replace(base=other, options={"dtype": "float32"}), url, **more)
        assert f"another merge has begun this output (process {os.getpid()} on " in str(caught.value)
        assert f"its base is {merge.base}, here {other}; its --dtype is not given, here float32" in str(
            caught.value
        )
        assert "to finish that merge, repeat its command" in caught.value.hint
    with pytest.raises(WriteError, match="another run of this merge has begun this output") as caught:
        merged(merge, url)
    assert "pass --resume to continue it" in caught.value.hint
    assert "does not run any more" not in str(caught.value)

    gone = subprocess.Popen(["true"])
    gone.wait()
    staging = StoreStaging(url)
    staging.take_over(replace(staging.run(), process=gone.pid))
    with pytest.raises(
        WriteError, match=f"process {gone.pid} on .*, which does not run any more, begun"
    ) as caught:
        merged(merge, url)
    assert caught.value.hint == "pass --resume to continue it"


def test_a_run_that_says_that_it_ended_is_in_nobodys_way(dense, url, tmp_path):
    store_at(beside(url)).put("run.json", Run("another", 4711, "node7", 0.0, is_ended=True).text())
    store_at(url).put("model-00007-of-00007.safetensors", b"of another merge")
    merge = dense()
    merged(merge, url)
    assert bytes_of(store_at(url)) == on_disk(merge, tmp_path, name_of(url))


def wish(out: str) -> Wish:
    return Wish(out, resume=False, overwrite=False, marks=(), inputs=())


def test_of_files_of_this_machine_the_permissions_are_asked_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot be created, because .*/file is a file"):
        StoreDestination.check_writable(wish(f"file://{tmp_path}/file/out"))
    StoreDestination.check_writable(wish(f"file://{tmp_path}/new/out"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


class Listening:
    """An observer that notes what it hears of the phase in which files are made."""

    def __init__(self):
        self.total, self.heard, self._phase = 0, [], ""

    def phase(self, name, total_bytes):
        self._phase = name
        self.total = total_bytes if name == "merging" else self.total

    def advance(self, nbytes):
        if self._phase == "merging":
            self.heard.append(nbytes)

    def done(self, name):
        self.heard.append(name)


@pytest.mark.parametrize("executor", ["serial", "threads", "processes"])
def test_progress_moves_within_a_file_and_each_byte_is_told_once(executor, dense, tmp_path):
    watch, merge = Listening(), dense(executor=executor)
    merged(merge, f"file://{tmp_path}/out", observer=watch, workers=2, max_shard_size="1GB")
    first = next(n for n, one in enumerate(watch.heard) if isinstance(one, str))
    numbers = [one for one in watch.heard if not isinstance(one, str)]
    assert (
        sum(numbers)
        == watch.total
        == sum(one.nbytes for one in api.plan(adapter=str(merge.adapter), base=str(merge.base)).steps)
    )
    # Processes tell at the end of a file only.
    assert (first > 5) == (executor != "processes")


def test_an_observer_that_fails_within_a_file_ends_the_run_as_an_interrupt(dense, tmp_path):
    class Failing(Listening):
        def advance(self, nbytes):
            raise ZeroDivisionError

    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError):
        merged(dense(executor="threads", workers=2), f"file://{out}", observer=Failing())
    assert not (out / "config.json").exists()
    assert merged(dense(), f"file://{out}", resume=True).verdict.ok


class Stopping:
    """An observer that ends the run after some tensors."""

    def __init__(self, after):
        self._left = after

    def phase(self, name, total_bytes):
        pass

    def advance(self, nbytes):
        pass

    def done(self, name):
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


def test_an_interrupt_keeps_whole_files_and_another_run_goes_on_from_there(dense, url, tmp_path):
    merge = dense(workers=1)
    with pytest.raises(KeyboardInterrupt) as caught:
        merged(merge, url, observer=Stopping(after=2))
    assert "run again with --resume to continue: 1 finished file kept" in caught.value.__notes__[0]
    before = store_at(url).entries()
    assert [name for name in before if not name.endswith(".safetensors")] == []
    report = merged(merge, url, resume=True)
    assert [issue.code for issue in report.issues] == ["resumed"]
    after = store_at(url).entries()
    assert {name: after[name] for name in before} == before
    assert bytes_of(store_at(url)) == on_disk(merge, tmp_path, name_of(url))


def test_a_file_that_is_not_as_it_was_written_is_made_again(dense, url, tmp_path):
    merge = dense(workers=1)
    with pytest.raises(KeyboardInterrupt):
        merged(merge, url, observer=Stopping(after=2))
    (name,) = store_at(url).entries()
    store_at(url).put(name, b"x" * store_at(url).entries()[name].nbytes)
    merged(merge, url, resume=True)
    assert bytes_of(store_at(url)) == on_disk(merge, tmp_path, name_of(url))


def test_an_output_inside_an_input_or_around_it_is_refused(dense, tmp_path):
    # Beside the shared base are directories of other tests, with names that obstore cannot list.
    merge = dense()
    merge = merge._replace(base=shutil.copytree(merge.base, tmp_path / "base"))
    with pytest.raises(WriteError, match="is inside the input"):
        merged(merge, StoreUrl("file", "", str(merge.base / "merged").lstrip("/")))
    with pytest.raises(WriteError, match="contains the input"):
        merged(merge, StoreUrl("file", "", str(merge.base.parent).lstrip("/")))


def test_links_into_a_store_are_refused(dense, url, cli):
    done = cli(*dense().arguments(url, "--link", "hard"))
    assert done.exit_code
    assert "which has no links" in done.output


@pytest.mark.loopback
def test_no_secret_travels_or_stays(dense, s3_url, capsys):
    merge = dense(workers=1)
    assert SECRET.encode() not in pickle.dumps(StoreFiles(s3_url, "merge"))
    with pytest.raises(KeyboardInterrupt):
        merged(merge, s3_url, observer=Stopping(after=2))
    left = {**bytes_of(store_at(beside(s3_url))), **bytes_of(store_at(s3_url))}
    merged(merge, s3_url, resume=True)
    left |= {f"new {name}": data for name, data in bytes_of(store_at(s3_url)).items()}
    assert not [name for name, data in left.items() if SECRET.encode() in data]
    assert SECRET not in "".join(capsys.readouterr())


@pytest.mark.loopback
def test_uploads_that_killed_runs_left_are_gone_when_the_output_is_complete(dense, moto, s3_url):
    name = "model-00001-of-00003.safetensors"
    for key in (f"{s3_url.prefix}/{name}", f"{s3_url.prefix}/other"):
        moto.create_multipart_upload(Bucket=s3_url.bucket, Key=key)
    merged(dense(), s3_url)
    assert name in store_at(s3_url).entries()
    left = moto.list_multipart_uploads(Bucket=s3_url.bucket, Prefix=s3_url.prefix)["Uploads"]
    # What is not a file of this output may be another program's.
    assert [upload["Key"] for upload in left] == [f"{s3_url.prefix}/other"]


def test_a_batch_makes_outputs_in_a_store_one_after_the_other_and_keeps_what_is_complete(
    dense, url, tmp_path, cli
):
    merge = dense()
    jobs = [
        {
            "name": name,
            "adapter": str(merge.adapter),
            "base": str(merge.base),
            "out": f"{url}/{name}",
            "dtype": dtype,
        }
        for name, dtype in (("one", "bfloat16"), ("two", "float32"))
    ]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    done = cli("batch", tmp_path / "jobs.yaml")
    assert done.exit_code == 0, done.output
    two = StoreUrl(url.scheme, url.bucket, f"{url.prefix}/two")
    assert bytes_of(store_at(two)) == on_disk(
        Merge(merge.base, merge.adapter, {"dtype": "float32"}), tmp_path, "two"
    )
    before = store_at(url).entries()
    again = cli("batch", tmp_path / "jobs.yaml")
    assert again.exit_code == 0, again.output
    assert "up to date by its manifest" in " ".join(again.output.split())
    assert store_at(url).entries() == before

    jobs[0]["dtype"] = "float16"
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    other = cli("batch", tmp_path / "jobs.yaml")
    assert other.exit_code == exits.BATCH
    assert "already exists and is not up to date: it was made with other options (dtype)" in " ".join(
        other.output.split()
    )
    assert store_at(url).entries() == before


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_batch_removes_what_a_killed_run_left_beside_a_complete_output_but_not_when_dry(
    is_dry, dense, url, tmp_path, cli, monkeypatch
):
    merge = dense()
    monkeypatch.chdir(tmp_path)
    merged(merge, url)
    # Killed between config.json and the removal of staging.
    store_at(url).put("model-00009-of-00009.safetensors", b"of an older output")
    staging = StoreStaging(url)
    staging.lock(Run("merge", 4711, "node7", 0.0))
    staging.seal(["model-00009-of-00009.safetensors"])
    # What has the URL as its path on this machine is not the output's staging.
    here = tmp_path / f"{url.scheme}:" / url.bucket / f"{url.prefix}.lora-merge-staging" / "output"
    here.mkdir(parents=True)
    jobs = [{"adapter": str(merge.adapter), "base": str(merge.base), "out": str(url)}]
    (tmp_path / "jobs.yaml").write_text(yaml.safe_dump({"jobs": jobs}))
    done = cli("batch", tmp_path / "jobs.yaml", *(["--dry-run"] if is_dry else []))
    assert done.exit_code == 0, done.output
    assert bool(store_at(beside(url)).entries()) is is_dry
    assert ("model-00009-of-00009.safetensors" in store_at(url).entries()) is is_dry
    assert here.is_dir()


@pytest.mark.parametrize(
    "text",
    [
        "file:HERE/x",
        "S3://mod/x",
        "s3:/mod/x",
        "s3:mod/x",
        "s3//mod/x",
        "gcs://mod/x",
        "https://host/x",
    ],
)
def test_a_misspelt_url_does_not_become_a_directory(text, cli, pico, pico_adapter, tmp_path, monkeypatch):
    base = pico()
    adapter = pico_adapter(base)
    monkeypatch.chdir(tmp_path)
    text = text.replace("HERE", str(tmp_path))

    done = cli("--base", base, "--adapter", adapter, "--out", text)

    assert done.exit_code == exits.RESOLVE
    assert f"{text}: is not a URL that an output can have" in done.stderr
    assert f"a directory of this name is ./{text}" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_trying_to_write_leaves_the_empty_folders_above_an_output(tmp_path):
    """The user may be in one of them."""
    above = tmp_path / "one" / "two"
    above.mkdir(parents=True)
    before = above.stat().st_ino
    StoreDestination.check_writable(wish(f"file://{above}/out"))
    assert above.stat().st_ino == before
    assert list(above.iterdir()) == []


def test_what_a_killed_write_left_in_staging_goes_with_it(dense, tmp_path):
    out = StoreUrl("file", "", str(tmp_path / "out").lstrip("/"))
    staging = tmp_path / ("out" + SUFFIX)
    staging.mkdir()
    (staging / "run.json#1").write_text("half")  # as obstore names a file until it is whole
    merged(dense(), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
