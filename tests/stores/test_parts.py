"""Outputs that several processes make: each its files; then one that verifies and publishes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_merge import api
from lora_merge.errors import RequestError, WriteError
from lora_merge.merging.by_file import file_pieces
from lora_merge.merging.parts import Part, part_of
from lora_merge.storage.objects import store_at
from lora_merge.storage.store_staging import beside
from tests.stores.merging import Merge, bytes_of, name_of, on_disk

ROOT = Path(__file__).parents[2]
KILLED = """
import json, sys
from tests.stores.store_killing import armed
from lora_merge.cli import main
arguments, at = json.loads(sys.argv[1])
armed(at)
main(arguments, prog_name="lora-merge")
"""
"""A command that is killed in front of one of its operations on the store."""


@pytest.fixture
def merge(pico, pico_adapter):
    """Return a merge of a base in three files."""
    base = pico("llama", "bfloat16", "60KB")
    return Merge(base, pico_adapter(base), {})


def begun(arguments, at=None):
    """Begin the command in a process of its own."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", KILLED, json.dumps([arguments, at])]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def ended(process):
    _, err = process.communicate(timeout=300)
    return process.returncode, err


@pytest.mark.system
@pytest.mark.parametrize("seed", [1, 3])
def test_three_processes_make_one_output_though_one_of_them_is_killed(merge, url, tmp_path, cli, seed):
    parts = [merge.arguments(url, "--part", f"{n}/3") for n in (1, 2, 3)]
    processes = [begun(arguments, at=seed if n == 1 else None) for n, arguments in enumerate(parts)]
    codes = [ended(process)[0] for process in processes]
    assert codes == [0, -signal.SIGKILL, 0]
    made = [name for name in store_at(url).entries() if name.endswith(".safetensors")]
    assert "config.json" not in store_at(url).entries()

    early = cli(*merge.arguments(url, "--seal"))
    assert early.exit_code
    assert "1 of 3 files are missing: model-0000" in early.stderr
    assert "config.json" not in store_at(url).entries()

    again = ended(begun(parts[1]))
    assert again[0] == 0, again[1]
    before = store_at(url).entries()
    sealed = cli(*merge.arguments(url, "--seal"))
    assert sealed.exit_code == 0, sealed.output
    assert "verified" in sealed.output
    after = store_at(url).entries()
    assert {name: after[name] for name in before} == before
    assert set(made) <= set(before)
    assert bytes_of(store_at(url)) == on_disk(merge, tmp_path, name_of(url))
    assert not store_at(beside(url)).entries()


def test_parts_of_a_directory_make_what_one_run_makes(merge, tmp_path):
    out = tmp_path / "out"

    def run(**more):
        return api.merge(base=str(merge.base), adapter=str(merge.adapter), out=out, **more)

    reports = [run(part=f"{n}/2") for n in (1, 2)]
    assert [report.part.partition(" (")[0] for report in reports] == ["part 1 of 2", "part 2 of 2"]
    assert not (out / "config.json").exists()
    with pytest.raises(WriteError, match="is not a model checkpoint") as caught:
        run()
    assert "it was begun with --part: finish its parts and --seal" in caught.value.hint
    assert run(seal=True).verdict.ok
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert found == on_disk(merge, tmp_path, "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
    times = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    # A job that the scheduler repeats.
    for again in ({"part": "1/2"}, {"seal": True}, {"resume": True, "seal": True}):
        report = run(**again)
        assert report.was_complete
        assert [issue.code for issue in report.issues] == ["complete"]
    for other in ({"dtype": "float32"}, {"max_shard_size": "40KB"}):
        with pytest.raises(
            WriteError, match=rf"may make something else: .*other options \({next(iter(other))}\)"
        ):
            run(part="1/2", **other)
    assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == times


def test_a_part_of_another_merge_is_refused(merge, url):
    api.merge(base=str(merge.base), adapter=str(merge.adapter), out=str(url), part="1/2")
    with pytest.raises(
        WriteError, match=r"another merge has begun this output .*: its --dtype is not given, here float32"
    ):
        api.merge(base=str(merge.base), adapter=str(merge.adapter), out=str(url), part="2/2", dtype="float32")


def test_times_and_inodes_of_another_machine_do_not_matter_where_bytes_are_equal(
    merge, url, tmp_path, monkeypatch
):
    api.merge(base=str(merge.base), adapter=str(merge.adapter), out=str(url), part="1/2")
    # Another node reads the adapter and the small files from a disk of its own.
    for path in (*merge.adapter.iterdir(), merge.base / "config.json"):
        new = path.with_name("new")
        new.write_bytes(path.read_bytes())
        new.replace(path)
    api.merge(base=str(merge.base), adapter=str(merge.adapter), out=str(url), part="2/2")
    assert api.merge(base=str(merge.base), adapter=str(merge.adapter), out=str(url), seal=True).verdict.ok


@pytest.mark.parametrize("of", [1, 2, 3, 5])
def test_each_file_is_in_one_part_and_no_part_has_much_more_than_another(merge, of):
    pieces = file_pieces(api.plan(adapter=str(merge.adapter), base=str(merge.base)))
    shares = [Part(n + 1, of).share(pieces) for n in range(of)]
    assert sorted(piece.files[0].name for own in shares for piece in own) == sorted(
        piece.files[0].name for piece in pieces
    )
    loads = [sum(piece.nbytes for piece in own) for own in shares]
    assert max(loads) - min(loads) <= max(piece.nbytes for piece in pieces)


@pytest.mark.parametrize(
    ("text", "environ", "sentence"),
    [
        ("auto", {}, "is auto, but SLURM_ARRAY_TASK_ID is not set"),
        ("auto/4", {}, "is auto/N, but JOB_COMPLETION_INDEX is not set"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "4"}, "is number 5 of 4"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "x"}, "JOB_COMPLETION_INDEX is 'x'"),
    ],
)
def test_a_part_that_the_environment_does_not_tell_is_an_error(text, environ, sentence):
    with pytest.raises(RequestError, match=sentence):
        part_of(text, environ)


def test_a_job_array_may_begin_anywhere_and_go_in_steps():
    array = {
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_ARRAY_TASK_STEP": "2",
    }
    assert part_of("auto", array) == Part(3, 4)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "auto/0", "auto/", "/3", "1/3/5", "-1/3", ""])
def test_what_is_not_a_part_is_refused(merge, text):
    with pytest.raises(RequestError, match="is not a part"):
        api.merge(base=str(merge.base), adapter=str(merge.adapter), out="out", part=text)


def test_a_part_cannot_seal(merge, tmp_path):
    with pytest.raises(RequestError, match="cannot be combined with --part"):
        api.merge(
            base=str(merge.base), adapter=str(merge.adapter), out=tmp_path / "out", part="1/2", seal=True
        )
