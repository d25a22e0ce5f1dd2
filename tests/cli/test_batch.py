"""``lora-merge batch`` as a user meets it: what is made and what is kept, what one fault does to the others, what is said."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import yaml

from lora_merge.batches import run as batches
from lora_merge.cli import exits
from lora_merge.cli.watching import _Plain, board_lines
from lora_merge.merging.peak import RUNTIME_BYTES
from lora_merge.storage import journal
from lora_merge.storage import publish as publishing
from lora_merge.storage.folder import Folder
from lora_merge.storage.staging import SUFFIX, staging
from tests.faults.table import _failing
from tests.tampering import edit_json, edit_tensors

COMMAND = [sys.executable, "-m", "lora_merge"]
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def batch(cli, tmp_path, monkeypatch):
    """Return a function: jobs, options, defaults → the exit code, the report as data, and what was said beside it."""
    monkeypatch.chdir(tmp_path)

    def run(jobs, *options, **defaults):
        write(tmp_path, jobs, **defaults)
        result = cli("batch", "batch.yaml", "--json", *options)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, json.loads(result.stdout), result.stderr

    return run


def write(root, jobs, **defaults):
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in defaults.items()}
    (root / "batch.yaml").write_text(yaml.safe_dump({"defaults": texts, "jobs": jobs}))


def states(report):
    return {job["name"]: job["state"] for job in report["jobs"]}


def job_of(report, name):
    return next(job for job in report["jobs"] if job["name"] == name)


def contents(root):
    """Return the bytes of every file."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def untouched(root):
    """Return what shows that nobody wrote anything: of every file and directory its number, times and bytes."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.stat()
        data = path.read_bytes() if path.is_file() else b""
        found[path.relative_to(root).as_posix()] = (
            status.st_ino,
            status.st_mtime_ns,
            status.st_ctime_ns,
            data,
        )
    return found


def leftovers(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def base(pico):
    return pico("llama", "float16")


@pytest.fixture
def adapter(base, pico_adapter):
    return pico_adapter(base)


@pytest.fixture
def three(base, adapter, tmp_path):
    """Three jobs on one base: ``out/one``, ``out/bad`` and ``out/two``, whose adapters are copies."""
    for name in ("one", "bad", "two"):
        shutil.copytree(adapter, tmp_path / "runs" / name)
    return [{"adapter": f"runs/{name}", "out": f"out/{name}"} for name in ("one", "bad", "two")]


# ---------------------------------------------------------------------------- twenty jobs


@pytest.fixture
def twenty(base, pico_adapter, tmp_path):
    """Twenty adapters, two of them broken, and what mends them."""
    for n in range(20):
        shutil.copytree(pico_adapter(base, r=2 + n % 3), tmp_path / "runs" / f"a{n}")
    for n in (7, 13):
        shutil.copytree(tmp_path / "runs" / f"a{n}", tmp_path / "sound" / f"a{n}")
    edit_tensors(tmp_path / "runs" / "a7" / WEIGHTS, lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"))
    os.truncate(tmp_path / "runs" / "a13" / WEIGHTS, 3000)

    def mend():
        shutil.copytree(tmp_path / "sound", tmp_path / "runs", dirs_exist_ok=True)

    return [{"adapter": "runs/a*", "out": "merged/{1}"}], mend


BROKEN = {"merged/7", "merged/13"}


def test_of_twenty_jobs_none_is_begun_while_one_cannot_be_planned(twenty, base, batch, tmp_path):
    jobs, _ = twenty

    code, report, said = batch(jobs, base=base)

    assert code == exits.BATCH
    assert {name for name, state in states(report).items() if state == "failed"} == BROKEN
    assert {state for name, state in states(report).items() if name not in BROKEN} == {"not run"}
    assert "20 jobs: 2 failed, 18 not run" in said
    assert said.rstrip().endswith("\nhint: --keep-going runs the other jobs too")
    assert leftovers(tmp_path) == ["batch.yaml", "runs", "sound"]


def test_of_twenty_jobs_with_two_broken_ones_eighteen_are_made_and_made_once(twenty, base, batch, tmp_path):
    jobs, mend = twenty

    code, report, said = batch(jobs, "--keep-going", base=base)

    assert code == exits.BATCH
    assert not report["ok"]
    assert list(states(report)) == [f"merged/{n}" for n in range(20)]
    assert {name for name, state in states(report).items() if state == "failed"} == BROKEN
    assert list(states(report).values()).count("done") == 18
    assert leftovers(tmp_path / "merged") == sorted(str(n) for n in range(20) if n not in {7, 13})
    for words in (
        "error: merged/7: model.layers.0.self_attn.q_proj: has lora_A and no lora_B",
        f"error: merged/13: runs/a13/{WEIGHTS}: has 3000 bytes, expected",
        "hint: download the file again: it is truncated, or was extended",
        "20 jobs: 18 done, 2 failed",
    ):
        assert words in said
    before = untouched(tmp_path / "merged")

    code, report, said = batch(jobs, "--keep-going", base=base)

    assert code == exits.BATCH
    assert list(states(report).values()).count("kept") == 18
    assert "20 jobs: 18 kept, 2 failed" in said
    assert untouched(tmp_path / "merged") == before

    mend()
    code, report, said = batch(jobs, base=base)

    assert code == exits.OK
    assert report["ok"]
    assert {name for name, state in states(report).items() if state == "done"} == BROKEN
    assert "20 jobs: 2 done, 18 kept" in said
    after = untouched(tmp_path / "merged")
    assert {name: after[name] for name in before} == before
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"7", "13"}


# ---------------------------------------------------------------------------- what is kept, what is made again


def test_an_output_is_kept_only_while_everything_is_as_it_was(base, adapter, batch, tampered, tmp_path):
    tampered(base, "base")
    tampered(adapter, "adapter")
    job = {"adapter": "adapter", "base": "base", "out": "out"}
    tensors = tmp_path / "out" / "model.safetensors"
    changes = {
        "nothing": lambda: None,
        "a time of the base's weights": lambda: os.utime(tmp_path / "base" / "model.safetensors"),
        "a time of the base's configuration": lambda: os.utime(tmp_path / "base" / "config.json"),
        "the adapter's weights": lambda: edit_tensors(
            tmp_path / "adapter" / WEIGHTS, lambda found: found[f"{Q_PROJ}.lora_B.weight"].mul_(2)
        ),
        "the adapter's configuration": lambda: edit_json(
            tmp_path / "adapter" / "adapter_config.json", lora_alpha=12
        ),
        "a weight file that is gone": tensors.unlink,
        "a weight file that was cut off": lambda: os.truncate(tensors, 1000),
        "a manifest that is gone": (tmp_path / "out" / "merge_manifest.json").unlink,
        "a manifest that is broken": lambda: (tmp_path / "out" / "merge_manifest.json").write_text("{"),
        "the dtype": lambda: job.update(dtype="bfloat16"),
        "the size of shards": lambda: job.update(max_shard_size="50KB"),
        "the adapter's weight": lambda: job.update(adapter="adapter:0.5"),
        "a second adapter": lambda: job.update(adapter=["adapter:0.5", str(adapter)]),
        "their order": lambda: job.update(adapter=[str(adapter), "adapter:0.5"]),
        "how they are combined": lambda: job.update(combine="dare_ties"),
        "the seed": lambda: job.update(seed=5),
        "what is verified": lambda: job.update(verify="full"),
        "how many work": lambda: job.update(workers=1),
    }
    kept = {
        "nothing",
        "what is verified",
        "how many work",
        "a time of the base's weights",
        "a time of the base's configuration",
    }
    assert batch([job])[0] == exits.OK
    for what, change in changes.items():
        change()
        before = contents(tmp_path / "out")
        code, report, said = batch([job])
        if what in kept:
            assert (code, states(report)) == (exits.OK, {"out": "kept"}), (what, said)
            continue
        assert (code, states(report)) == (exits.BATCH, {"out": "failed"}), what
        assert "out: already exists" in said
        assert contents(tmp_path / "out") == before, what
        code, report, said = batch([job], "--overwrite")
        assert (code, states(report)) == (exits.OK, {"out": "done"}), (what, said)
        assert states(batch([job], "--overwrite")[1]) == {"out": "kept"}, what


def test_an_output_may_be_spelt_in_another_way(base, adapter, batch, tmp_path):
    (tmp_path / "x").mkdir()
    job = {"adapter": str(adapter), "base": str(base), "out": "out"}
    assert batch([job])[0] == exits.OK

    for out in (str(tmp_path / "out"), "./out", "./x/../out"):
        assert list(states(batch([{**job, "out": out}])[1]).values()) == ["kept"], out


def test_what_is_no_checkpoint_is_left_alone_whatever_is_asked(three, base, batch, tmp_path):
    (tmp_path / "out" / "bad").mkdir(parents=True)
    (tmp_path / "out" / "bad" / "thesis.tex").write_text("years of work")

    code, report, said = batch(three, "--overwrite", "--keep-going", base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    assert (
        "out/bad: already exists and is not a model checkpoint (it has no config.json or merge_manifest.json)"
        in said
    )
    assert leftovers(tmp_path / "out" / "bad") == ["thesis.tex"]


def test_an_output_of_another_merge_is_replaced_where_that_is_said_and_only_there(
    three, base, batch, tmp_path
):
    assert batch([three[0] | {"out": "out/bad"}], base=base)[0] == exits.OK
    edit_json(tmp_path / "runs" / "bad" / "adapter_config.json", lora_alpha=12)
    before = untouched(tmp_path / "out")

    code, report, _ = batch(three, base=base)
    assert code == exits.BATCH
    assert states(report) == {"out/one": "not run", "out/bad": "failed", "out/two": "not run"}
    assert "already exists" in job_of(report, "out/bad")["message"]
    assert untouched(tmp_path / "out") == before

    code, report, _ = batch(three, "--no-overwrite", "--keep-going", base=base, overwrite=True)
    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}

    code, report, _ = batch(three, base=base, overwrite=True)
    assert code == exits.OK
    assert states(report) == {"out/one": "kept", "out/bad": "done", "out/two": "kept"}
    manifest = json.loads((tmp_path / "out" / "bad" / "merge_manifest.json").read_text())
    assert manifest["adapters"][0]["config"]["lora_alpha"] == 12


# ---------------------------------------------------------------------------- conversions


def test_a_conversion_is_kept_only_while_everything_is_as_it_was(
    base, pico_adapter, batch, tampered, tmp_path
):
    tampered(pico_adapter(base, r=24), "adapter")
    job = {"convert": "adapter", "for": "vllm", "rank": 16, "out": "out/{adapter}-16"}
    out = tmp_path / "out" / "adapter-16"

    code, report, said = batch([job])

    assert code == exits.OK, said
    (found,) = report["jobs"]
    assert (found["kind"], found["state"], found["out"]) == ("convert", "done", "out/adapter-16")
    assert {one["rank"] for one in found["report"]["modules"]} == {16}
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 16
    changes = {
        "nothing": lambda: None,
        "the weights": lambda: edit_tensors(
            tmp_path / "adapter" / WEIGHTS, lambda found: found[f"{Q_PROJ}.lora_B.weight"].mul_(2)
        ),
        "the configuration": lambda: edit_json(tmp_path / "adapter" / "adapter_config.json", lora_alpha=12),
        "a time": lambda: os.utime(tmp_path / "adapter" / WEIGHTS),
        "the rank": lambda: job.update(rank=8),
        "a base": lambda: job.update(base=str(base)),
        "a dtype": lambda: job.update(dtype="float32"),
        "another engine": lambda: job.update({"for": "lmdeploy"}),
    }
    for what, change in changes.items():
        change()
        before = untouched(out)
        code, report, said = batch([job])
        if what in {"nothing", "a time"}:
            assert (code, states(report)) == (exits.OK, {"out/adapter-16": "kept"}), said
        else:
            assert (code, states(report)) == (exits.BATCH, {"out/adapter-16": "failed"}), what
            assert "already exists" in said
        assert untouched(out) == before, what
        if what not in {"nothing", "a time"}:
            code, report, said = batch([job], "--overwrite")
            assert (code, states(report)) == (exits.OK, {"out/adapter-16": "done"}), (what, said)
            assert states(batch([job], "--overwrite")[1]) == {"out/adapter-16": "kept"}, what


def test_options_that_are_lists_do_not_make_a_conversion_another_one(base, adapter, batch):
    jobs = [
        {
            "convert": str(adapter),
            "base": str(base),
            "expert_layout": ["out-in"],
            "bake_scale": True,
            "out": "out",
        }
    ]

    assert [states(batch(jobs)[1]) for _ in range(2)] == [{"out": "done"}, {"out": "kept"}]


def test_conversions_may_lie_in_the_folder_of_their_adapter(base, pico_adapter, batch, tampered, tmp_path):
    tampered(pico_adapter(base, r=8), "adapter")
    jobs = [{"convert": "adapter", "matrix": {"rank": [2, 4]}, "out": "adapter/rank-{rank}"}]

    assert set(states(batch(jobs)[1]).values()) == {"done"}
    before = untouched(tmp_path / "adapter")
    assert set(states(batch(jobs)[1]).values()) == {"kept"}
    assert untouched(tmp_path / "adapter") == before


def test_a_conversion_that_cannot_be_done_is_told_apart_from_those_that_can(
    base, adapter, pico_adapter, batch, tmp_path
):
    jobs = [
        {"convert": str(pico_adapter(base, r=32)), "for": "vllm", "out": "out/large"},
        {"convert": str(adapter), "for": "lmdeploy", "out": "out/small"},
        {"convert": str(pico_adapter(base, use_dora=True)), "for": "vllm", "out": "out/dora"},
        {"adapter": str(adapter), "base": str(base), "out": "out/merged"},
    ]

    code, report, said = batch(jobs, "--keep-going")

    assert code == exits.BATCH
    assert states(report)["out/small"] == states(report)["out/merged"] == "done"
    failed = [job for job in report["jobs"] if job["state"] == "failed"]
    assert "out/dora" in {job["name"] for job in failed}
    for job in failed:
        assert job["error"] in {"ConvertError", "PlanError", "UnsupportedError"}
        assert job["issues"]
        assert f"error: {job['name']}: " in said
    assert leftovers(tmp_path / "out") == sorted(
        name.removeprefix("out/") for name, state in states(report).items() if state == "done"
    )


# ---------------------------------------------------------------------------- what one fault does to the others


def overflow(root):
    """Give an adapter a change that float16 cannot hold: nothing but merging it shows that."""
    edit_json(root / "adapter_config.json", lora_alpha=1e9)


@pytest.mark.parametrize("options", [(), ("--keep-going",)], ids=["", "keep going"])
def test_an_adapter_that_only_reading_shows_to_be_broken_takes_no_other_down(
    options, three, base, pico, batch, tmp_path
):
    overflow(tmp_path / "runs" / "bad")
    other = pico("qwen2", "float16")
    jobs = [*three, {"adapter": "runs/one", "base": str(other), "out": "out/later"}]

    code, report, said = batch(jobs, *options, base=base)

    later = "done" if options else "not run"
    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done", "out/later": later}
    assert job_of(report, "out/bad")["error"] == "VerifyError"
    assert "error: out/bad: the output failed verification: " in said
    assert "weight: holds NaN or infinite values after the merge (F16)" in said
    assert leftovers(tmp_path / "out") == sorted(["one", "two", *(["later"] if options else [])])


@contextlib.contextmanager
def full(name, after, *, where="/bad"):
    """Have the disk be full for one output."""
    with _failing(
        name, errno.ENOSPC, after, when=lambda fd, *_: where in str(Path(f"/proc/self/fd/{fd}").readlink())
    ):
        yield


@pytest.mark.parametrize(("call", "after"), [("posix_fallocate", 0), ("pwritev", 2)])
def test_a_disk_that_is_full_for_one_output_takes_no_other_down(call, after, three, base, batch, tmp_path):
    with full(call, after):
        code, report, said = batch(three, "--keep-going", base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    assert "no space left on the disk" in job_of(report, "out/bad")["message"]
    assert "error: out/bad: " in said
    assert leftovers(tmp_path / "out") in (["one", "two"], ["bad.lora-merge-staging", "one", "two"])
    before = untouched(tmp_path / "out" / "one")

    code, report, _ = batch(three, base=base)

    assert code == exits.OK
    assert states(report) == {"out/one": "kept", "out/bad": "done", "out/two": "kept"}
    assert untouched(tmp_path / "out" / "one") == before
    assert leftovers(tmp_path / "out") == ["bad", "one", "two"]
    one, bad = (contents(tmp_path / "out" / name)["model.safetensors"] for name in ("one", "bad"))
    assert one == bad


def test_an_output_that_another_run_is_writing_takes_no_other_down(three, base, batch, tmp_path):
    (tmp_path / "out").mkdir()
    with staging(tmp_path / "out" / "bad"):
        code, report, _ = batch(three, "--keep-going", base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    assert "another run is writing this output" in job_of(report, "out/bad")["message"]


@pytest.mark.parametrize("when", ["planned", "copying", "verifying"])
@pytest.mark.parametrize("what", ["touched", "cut off", "removed"])
def test_an_adapter_that_changes_once_it_is_planned_fails_alone(
    what, when, three, base, batch, tmp_path, monkeypatch
):
    weights = tmp_path / "runs" / "bad" / WEIGHTS
    change = {
        "touched": lambda: os.utime(weights),
        "cut off": lambda: os.truncate(weights, 3000),
        "removed": weights.unlink,
    }
    pending = [change[what]]

    def phase(self, name, total_bytes):
        if name == when and pending:
            pending.pop()()

    def job(self, name, state, sentence=""):
        if when == "planned" and name == "out/two" and state == "planned":
            pending.pop()()

    monkeypatch.setattr(_Plain, "phase", phase)
    monkeypatch.setattr(_Plain, "job", job)

    code, report, _ = batch(three, "--keep-going", base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    assert job_of(report, "out/bad")["error"] in {"ChangedError", "CheckpointError"}
    assert str(weights) in job_of(report, "out/bad")["message"]
    assert leftovers(tmp_path / "out") == ["one", "two"]


@contextlib.contextmanager
def a_bug_in(place):
    """Have lora-merge itself fail of the adapter ``bad``, where a plan is made, rows are merged or the card is written."""

    def failing(real):
        def call(*arguments, **named):
            if "runs/bad" in repr(arguments):
                raise ZeroDivisionError("of a job's own\x1b[2J")
            return real(*arguments, **named)

        return call

    module, name = {
        "planning": ("lora_merge.batches.run", "plan_request"),
        "merging": ("lora_merge.merging.worker.merger", "Working"),
        "sealing": ("lora_merge.merging.hf_checkpoint", "card_text"),
    }[place]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[module], name, failing(getattr(sys.modules[module], name)))
        yield


@pytest.mark.parametrize("place", ["planning", "merging", "sealing"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_bug_that_one_job_meets_takes_no_other_down(place, bad, three, base, batch, tmp_path):
    three.insert(bad, three.pop(1))
    with a_bug_in(place):
        code, report, said = batch(three, "--keep-going", "-v", "--log-file", "log", base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    job = job_of(report, "out/bad")
    assert job["error"] == "BugError"
    assert job["message"] == "internal error in lora-merge: ZeroDivisionError: of a job's own\\x1b[2J"
    assert "report this bug, with the traceback" in job["hint"]
    assert job["traceback"].startswith("Traceback (most recent call last)")
    assert "error: out/bad: internal error in lora-merge: ZeroDivisionError: of a job's own\\x1b[2J" in said
    assert "Traceback (most recent call last)" in said
    lines = logged(tmp_path / "log")
    assert [line["name"] for line in lines if line["event"] == "bug"] == ["out/bad"]
    assert lines[-1]["event"] == "end"
    assert leftovers(tmp_path / "out") == ["one", "two"]
    code, report, _ = batch(three, base=base)
    assert states(report) == {"out/one": "kept", "out/bad": "done", "out/two": "kept"}


def test_a_bug_of_one_job_is_a_fault_like_any_other_where_nothing_is_to_go_on(three, base, batch, tmp_path):
    with a_bug_in("planning"):
        code, report, said = batch(three, base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "not run", "out/bad": "failed", "out/two": "not run"}
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_an_interrupt_that_comes_as_another_error_is_an_interrupt(three, base, batch, monkeypatch):
    def interrupted(*arguments):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(batches, "plan_request", interrupted)

    code, report, _ = batch(three, "--keep-going", base=base)

    assert code == exits.INTERRUPTED
    assert set(states(report).values()) == {"not run"}


def test_warnings_count_as_errors_only_of_the_job_that_says_so(three, base, batch):
    for job in three:
        job["device"] = "cuda"
    three[1]["strict"] = True

    code, report, said = batch(three, "--keep-going", base=base)

    assert code == exits.BATCH
    assert states(report) == {"out/one": "done", "out/bad": "failed", "out/two": "done"}
    assert "warning: out/one: device: torch" in said
    assert "error: out/bad: device: torch" in said


def test_room_for_each_output_and_not_for_all_is_said_before_any_is_begun(
    three, base, batch, tmp_path, monkeypatch
):
    needed = batch(three, "--dry-run", base=base)[1]["jobs"][0]["report"]["summary"]["disk_needed_bytes"]
    monkeypatch.setattr("lora_merge.storage.local_output.LocalDestination.free_bytes", lambda out: 2 * needed)

    code, report, said = batch(three, base=base)

    assert code == exits.BATCH
    assert set(states(report).values()) == {"failed"}
    assert "3 outputs need" in said
    assert not (tmp_path / "out").exists()
    assert batch(three, "--keep-going", base=base)[0] == exits.OK  # as far as it goes: and there was room


# ---------------------------------------------------------------------------- what is said


def test_a_dry_run_plans_everything_and_writes_nothing(three, base, batch, tmp_path):
    jobs = [*three, {"convert": "runs/one", "for": "lmdeploy", "out": "converted"}]
    before = untouched(tmp_path / "runs")

    code, report, said = batch(jobs, "--dry-run", base=base)

    assert code == exits.OK
    assert (report["ok"], report["dry_run"]) == (True, True)
    assert set(states(report).values()) == {"planned"}
    assert "4 jobs: 4 planned" in said
    (tmp_path / "runs" / "bad" / "adapter_config.json").write_text("{")
    code, report, said = batch(jobs, "--dry-run", base=base)
    assert code == exits.BATCH
    assert not report["ok"]
    assert states(report)["out/bad"] == "failed"
    assert list(states(report).values()).count("planned") == 3
    assert leftovers(tmp_path) == ["batch.yaml", "runs"]
    after = untouched(tmp_path / "runs")
    assert {name: after[name] for name in before if not name.startswith("bad")} == {
        name: before[name] for name in before if not name.startswith("bad")
    }


def test_a_dry_run_warns_of_what_a_run_would_stumble_over(three, base, batch, monkeypatch):
    monkeypatch.setattr("lora_merge.storage.local_output.LocalDestination.free_bytes", lambda out: 1)
    three[1] = {"convert": "runs/one", "for": "lmdeploy", "out": "converted"}

    code, report, said = batch(three, "--dry-run", base=base)

    assert code == exits.OK
    assert [[issue["code"] for issue in job["issues"]] for job in report["jobs"]] == [["disk"], [], ["disk"]]
    assert said.count("warning: out/") == 2
    assert "but its disk has only 1 B free" in said


def test_json_is_one_document_about_every_job(three, base, batch):
    three[1]["adapter"] = "runs/none"
    jobs = [*three, {"name": "smaller", "convert": "runs/one", "rank": 2, "out": "converted"}]

    code, report, _ = batch(jobs, "--keep-going", "--offline", base=base)

    assert code == exits.BATCH
    assert report.keys() == {"ok", "file", "jobs", "seconds", "dry_run"}
    assert (report["file"], report["ok"], report["dry_run"]) == ("batch.yaml", False, False)
    for job in report["jobs"]:
        assert job.keys() == {
            "name", "kind", "out", "state", "error", "message", "hint", "issues", "seconds", "traceback", "report",
        }  # fmt: skip
    one, bad, _, smaller = report["jobs"]
    assert (one["kind"], one["error"], one["message"]) == ("merge", "", "")
    assert one["report"]["summary"]["n_merged"] == 4
    assert one["report"]["verdict"]["level"] == "sample"
    assert 0 < one["seconds"] <= report["seconds"]
    assert bad["error"] == "ResolveError"
    assert bad["message"].startswith("runs/none: this directory does not exist")
    assert bad["report"] is None
    assert (smaller["name"], smaller["kind"], smaller["out"]) == ("smaller", "convert", "converted")
    assert smaller["report"]["transforms"]
    assert 0 < smaller["report"]["loss"]["energy"] < 1
    assert all(module["loss"]["relative"] > 0 for module in smaller["report"]["modules"])


def test_a_file_that_makes_no_sense_is_json_too(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("batch.yaml").write_text("jobs:\n- {adaptor: a, out: o}\n")

    result = cli("batch", "batch.yaml", "--json", "--log-file", "log")

    document = json.loads(result.stdout)
    assert result.exit_code == document["exit_code"] == exits.USAGE
    assert document["message"] == "batch.yaml:2: adaptor: unknown key for a merge"
    assert document["hint"] == "did you mean adapter?"
    assert leftovers(tmp_path) == ["batch.yaml"]


def test_a_table_is_for_people_and_quiet_leaves_the_errors(three, base, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, three, base=base)

    loud = cli("batch", "batch.yaml")
    quiet = cli("batch", "batch.yaml", "-q")

    assert (loud.exit_code, loud.stdout) == (exits.OK, "")
    for words in ("running: out/one", "done: out/bad", "out/two", "3 jobs: 3 done, in "):
        assert words in loud.stderr
    assert (quiet.exit_code, quiet.output) == (exits.OK, "")
    three[1]["adapter"] = "none"
    write(tmp_path, three, base=base)
    quiet = cli("batch", "batch.yaml", "-q", "--keep-going")
    assert quiet.exit_code == exits.BATCH
    lines = quiet.stderr.splitlines()
    assert lines[0] == "error: out/bad: none: this directory does not exist"
    assert lines[1].startswith("hint: ")
    assert lines[2].startswith("3 jobs: 2 kept, 1 failed, in ")
    assert len(lines) == 3


def test_why_a_job_failed_is_said_once_with_what_to_do_about_it(three, base, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    three[1]["adapter"] = "none"
    write(tmp_path, three, base=base)
    lines = cli("batch", "batch.yaml", "--keep-going").stderr.splitlines()
    assert "failed: out/bad" in lines
    why = [n for n, line in enumerate(lines) if "does not exist" in line]
    assert [lines[n] for n in why] == ["error: out/bad: none: this directory does not exist"]
    assert lines[why[0] + 1].startswith("hint: pass a directory")


def test_the_table_says_what_each_job_did_and_names_those_that_have_a_name(
    three, base, cli, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    jobs = [
        three[0],
        {"convert": "runs/one", "rank": 2, "out": "smaller"},
        {"convert": "runs/two", "out": "same"},
    ]

    write(tmp_path, jobs, base=base)
    unnamed = cli("batch", "batch.yaml").stderr
    write(tmp_path, [{"name": "first", **three[0]}], base=base)
    named = cli("batch", "batch.yaml").stderr

    for words in ("4 of 21 tensors merged", "% of the energy kept", "nothing lost"):
        assert words in unnamed
    assert re.search(r"^  output +state", unnamed, re.MULTILINE)
    assert re.search(r"^  job +output +state", named, re.MULTILINE)
    assert "first" in named
    assert "out/one" in named


def test_quiet_and_verbose_exclude_each_other(cli, tmp_path):
    write(tmp_path, [{"adapter": "a", "out": "o"}])

    result = cli("batch", tmp_path / "batch.yaml", "-q", "-v")

    assert result.exit_code == exits.USAGE
    assert "exclude each other" in result.stderr


def test_names_cannot_steer_the_terminal(base, adapter, batch):
    jobs = [
        {"name": "\x1b[31mred", "adapter": str(adapter), "out": "out"},
        {"name": "\x1b]0;title\x07", "adapter": "none\x1b[2J", "out": "out2"},
    ]

    _, _, said = batch(jobs, "--keep-going", base=base)

    assert "\x1b" not in said
    assert "\x07" not in said


def test_on_a_terminal_a_board_shows_the_jobs_that_matter():
    names = [f"job-{n}\x07" for n in range(30)]
    states = dict.fromkeys(names, "waiting") | dict.fromkeys(names[:25], "done")
    states |= {names[25]: "failed", names[26]: "running"}

    lines = board_lines(states, 80, 24)

    assert lines[0] == "1 running, 1 failed, 3 waiting, 25 done"
    for n, state in ((25, "failed"), (26, "running"), (27, "waiting")):
        assert any(f"job-{n}\\x07" in line and state in line for line in lines)
    assert lines[-1] == "  … and 12 done"
    assert len(lines) < 24


def test_one_pass_makes_no_more_outputs_than_memory_has_room_for(three, base, batch, tmp_path):
    _, planned, _ = batch(three, "--dry-run", base=base, workers=1)
    peak = planned["jobs"][0]["report"]["summary"]["peak_bytes"]
    own = peak - RUNTIME_BYTES

    def passes(limit):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        assert (
            batch(three, "--overwrite", "--log-file", log, base=base, workers=1, memory_limit=limit)[0]
            == exits.OK
        )
        shutil.rmtree(tmp_path / "out")
        return sum(line.get("name") == "merging" for line in logged(log) if line["event"] == "phase")

    assert [passes(RUNTIME_BYTES + n * own) for n in (1, 2, 3)] == [3, 2, 1]


# ---------------------------------------------------------------------------- the log


def logged(path):
    """Return the lines of a log, each of which has a time and an event; times do not go back."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    times = [datetime.fromisoformat(line["time"]) for line in lines]
    assert times == sorted(times)
    assert all(one.tzinfo is not None for one in times)
    assert {line["event"] for line in lines} <= {"job", "phase", "bug", "end"}
    return lines


def states_in(lines, name):
    return [line["state"] for line in lines if line["event"] == "job" and line["name"] == name]


def test_a_log_has_every_state_of_every_job_in_order_and_is_added_to(three, base, batch, tmp_path):
    overflow(tmp_path / "runs" / "bad")
    jobs = [
        *three,
        {"adapter": "none", "out": "out/none"},
        {"convert": "runs/one", "rank": 2, "out": "out/small"},
    ]
    log = tmp_path / "batch.jsonl"

    batch(jobs, "--keep-going", "--log-file", log, base=base)

    lines = logged(log)
    assert states_in(lines, "out/one") == states_in(lines, "out/small") == ["planned", "running", "done"]
    assert states_in(lines, "out/bad") == ["planned", "running", "failed"]
    assert states_in(lines, "out/none") == ["failed"]
    messages = {line["name"]: line["message"] for line in lines if "message" in line}
    assert messages.keys() == {"out/bad", "out/none"}
    assert "NaN or infinite" in messages["out/bad"]
    phases = [line["name"] for line in lines if line["event"] == "phase"]
    assert {"copying", "merging", "verifying", "flushing", "publishing", "making factors"} <= set(phases)
    assert [line["ok"] for line in lines if line["event"] == "end"] == [False]
    assert lines[-1]["event"] == "end"
    assert lines[-1]["seconds"] > 0
    n_lines = len(lines)

    batch(jobs[:1], "--log-file", log, base=base)

    lines = logged(log)[n_lines:]
    assert states_in(lines, "out/one") == ["kept"]
    assert lines[-1]["ok"] is True


def test_a_log_that_cannot_be_written_is_said_before_anything_is_done(three, base, batch, tmp_path):
    code, report, said = batch(three, "--log-file", tmp_path / "none" / "log", base=base)

    assert code == report["exit_code"] == exits.WRITE
    assert "none/log: cannot be written" in said
    assert leftovers(tmp_path) == ["batch.yaml", "runs"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is full here")
def test_a_log_that_fails_on_the_way_stops_nothing_and_is_said_at_the_end(three, base, batch, tmp_path):
    code, report, said = batch(three, "--log-file", "/dev/full", base=base)

    assert code == exits.WRITE
    assert set(states(report).values()) == {"done"}
    assert report["ok"]
    assert said.splitlines()[-1] == "error: the log is not complete: /dev/full: no space left on the disk"
    assert {name for name in leftovers(tmp_path / "out") if not name.endswith(SUFFIX)} == {
        "one",
        "two",
        "bad",
    }

    three[0]["adapter"] = "none"
    code, _, said = batch(three, "--log-file", "/dev/full", "--keep-going", base=base)

    assert code == exits.BATCH
    assert "error: the log is not complete" in said


def test_a_token_stands_nowhere(three, base, pico_adapter, batch, tmp_path):
    overflow(tmp_path / "runs" / "bad")
    three[0]["token"] = "hf_of_a_job"
    jobs = [
        *three,
        {"adapter": "org/none", "out": "out/none", "token": "hf_of_a_job"},
        {"convert": "runs/one", "rank": 2, "token": "hf_of_a_job", "out": "out/small"},
    ]

    for options in ((), ("--token", "hf_of_a_flag"), ("--dry-run",)):
        _, report, said = batch(
            jobs,
            "--keep-going",
            "--offline",
            "--log-file",
            "log",
            "-v",
            *options,
            base=base,
            token="hf_of_all",
        )
        assert states(report)["out/one"] in {"done", "kept"}
        assert states(report)["out/none"] == "failed"
        assert "hf_of" not in json.dumps(report) + said
    written = [
        path for place in ("out", "log") for path in (tmp_path / place, *(tmp_path / place).rglob("*"))
    ]
    assert not [path for path in written if path.is_file() and b"hf_of" in path.read_bytes()]


# ---------------------------------------------------------------------------- several processes


@pytest.fixture
def bases(pico, tmp_path):
    """Return a function: how many copies of a base, as directories beside each other."""

    def copies(n):
        for number in range(n):
            shutil.copytree(pico("llama", "float16"), tmp_path / "bases" / str(number))
        return [f"bases/{number}" for number in range(n)]

    return copies


def test_processes_write_what_one_process_writes_and_a_fault_stays_in_its_own(three, bases, batch, tmp_path):
    overflow(tmp_path / "runs" / "bad")
    jobs = [{**job, "base": base, "out": f"{job['out']}-{base[-1]}"} for base in bases(2) for job in three]
    jobs += [{"convert": "runs/one", "rank": 2, "out": "out/small"}]
    log = tmp_path / "log"

    code, one, _ = batch(jobs, "--keep-going", workers=1)
    serial = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    again, two, _ = batch(jobs, "--keep-going", "--jobs", 2, "--log-file", log, workers=1)

    assert code == again == exits.BATCH
    assert states(one) == states(two)
    assert list(states(two).values()).count("failed") == 2
    assert contents(tmp_path / "out") == serial
    for name in ("error", "message", "issues", "kind"):
        assert [job[name] for job in one["jobs"]] == [job[name] for job in two["jobs"]]
    lines = logged(log)
    for name, state in states(two).items():
        assert states_in(lines, name) == ["planned", "running", state]


def test_processes_begin_nothing_more_once_one_has_failed(three, bases, batch, tmp_path):
    overflow(tmp_path / "runs" / "bad")
    jobs = [
        {"adapter": f"runs/{name}", "base": base, "out": f"out/{base[-1]}-{name}"}
        for base in bases(4)
        for name in ("bad", "two")
    ]

    code, report, _ = batch(jobs, "--jobs", 2)

    assert code == exits.BATCH
    assert states(report) == {
        "out/0-bad": "failed", "out/0-two": "done", "out/1-bad": "failed", "out/1-two": "done",  # these were begun
        "out/2-bad": "not run", "out/2-two": "not run", "out/3-bad": "not run", "out/3-two": "not run",
    }  # fmt: skip
    assert leftovers(tmp_path / "out") == ["0-two", "1-two"]


_carried_out_elsewhere = batches._elsewhere


def elsewhere_with_a_death(errand):
    """Carry out a group, but for one that ends the process as the kernel does when memory is short."""
    if errand[1][0].name == "out/0":
        os.kill(os.getpid(), signal.SIGKILL)
    return _carried_out_elsewhere(errand)


def test_a_process_that_is_killed_fails_its_jobs_and_the_rest_is_done(
    three, bases, batch, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # for the processes, which are to import this
    monkeypatch.setattr(batches, "_elsewhere", elsewhere_with_a_death)
    jobs = [{"adapter": "runs/one", "base": base, "out": f"out/{base[-1]}"} for base in bases(4)]

    code, report, said = batch(jobs, "--jobs", 2, "--keep-going")

    assert code == exits.BATCH
    found = states(report)
    assert found == {"out/0": "failed", "out/1": "done", "out/2": "done", "out/3": "done"}
    assert "its process ended unexpectedly (SIGKILL)" in said
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    code, report, _ = batch(jobs)
    assert code == exits.OK
    assert states(report) == {name: "kept" if state == "done" else "done" for name, state in found.items()}


def elsewhere_with_a_bug(errand):
    """Carry out a group, but for one that ends in an error of a kind that no process but its own knows."""
    if errand[1][0].name == "out/0":
        raise type("OwnError", (Exception,), {})("what nobody expected")
    return _carried_out_elsewhere(errand)


def test_a_bug_in_a_process_fails_its_own_jobs_only(three, bases, batch, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    monkeypatch.setattr(batches, "_elsewhere", elsewhere_with_a_bug)
    jobs = [{"adapter": "runs/one", "base": base, "out": f"out/{base[-1]}"} for base in bases(3)]

    code, report, said = batch(jobs, "--jobs", 2, "--keep-going")

    assert code == exits.BATCH
    assert states(report) == {"out/0": "failed", "out/1": "done", "out/2": "done"}
    assert "error: out/0: internal error in lora-merge: OwnError: what nobody expected" in said


def test_a_process_that_cannot_be_started_fails_its_own_jobs_only(bases, three, batch, monkeypatch):
    start, n_started = batches.Crew._start, 0

    def scarce(crew):
        nonlocal n_started
        n_started += 1
        if n_started == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(crew)

    monkeypatch.setattr(batches.Crew, "_start", scarce)
    jobs = [{"adapter": "runs/one", "base": base, "out": f"out/{base[-1]}"} for base in bases(2)]

    code, report, _ = batch(jobs, "--jobs", 2, "--keep-going")

    assert code == exits.BATCH
    assert states(report) == {"out/0": "done", "out/1": "failed"}
    assert "cannot start a process for this job (Resource temp" in job_of(report, "out/1")["message"]


@pytest.mark.parametrize("key", ["adapter", "convert"])
def test_an_output_whose_name_is_too_long_is_an_error_of_its_job(key, three, base, batch):
    jobs = [three[0], {key: "runs/two", "out": "x" * 300}]

    code, report, _ = batch(jobs, "--keep-going", base=base)

    assert code == exits.BATCH
    assert [job["state"] for job in report["jobs"]] == ["done", "failed"]
    assert report["jobs"][1]["error"] == "WriteError"


# ---------------------------------------------------------------------------- interrupts


def ended_by_sigterm(root, n_outputs, *options):
    """Run a batch until some outputs are there, and send it SIGTERM; return its exit code and what it printed."""
    command = [*COMMAND, "batch", "batch.yaml", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=root, stdout=pipe, stderr=pipe, text=True) as process:
        while len(list((root / "out").glob("*/merge_manifest.json"))) < n_outputs and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    return process.returncode, stdout, stderr


@pytest.mark.system
@pytest.mark.parametrize("seconds", [0, 0.1, 0.2, 0.4, 0.8])
def test_ctrl_c_of_a_terminal_strikes_processes_that_have_hardly_begun_and_none_prints_a_traceback(
    seconds, three, bases, tmp_path
):
    write(tmp_path, [{**three[0], "base": base, "out": f"out/{base[-1]}"} for base in bases(3)])
    command = [*COMMAND, "batch", "batch.yaml", "--jobs", "2", "--log-file", "log"]
    pipe, log = subprocess.PIPE, tmp_path / "log"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        while '"running"' not in (log.read_text() if log.exists() else "") and process.poll() is None:
            time.sleep(0.002)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)

    assert "Traceback" not in stderr, stderr
    assert process.returncode == exits.INTERRUPTED, stderr


@pytest.mark.system
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_after_sigterm_the_report_says_what_was_done_and_a_second_run_does_the_rest(
    n_jobs, three, bases, batch, tmp_path
):
    jobs = [
        {"adapter": f"runs/{name}", "base": base, "out": f"out/{base[-1]}{name}"}
        for base in bases(8)
        for name in ("one", "two")
    ]
    write(tmp_path, jobs)
    code, stdout, stderr = ended_by_sigterm(tmp_path, 3, "--json", "--log-file", "log", "--jobs", str(n_jobs))

    assert code == exits.INTERRUPTED, stderr
    assert "error: interrupted; finished jobs are kept, run the same command again to continue" in stderr
    assert "Traceback" not in stderr
    report = json.loads(stdout)
    assert not report["ok"]
    left = leftovers(tmp_path / "out")
    finished = {name for name in left if not name.endswith(SUFFIX)}
    assert not {name for name in left if name.removesuffix(SUFFIX) in finished} - finished
    done = {name.removeprefix("out/") for name, state in states(report).items() if state == "done"}
    assert set(states(report).values()) == {"done", "not run"}
    assert done <= finished  # one may have got its name, and not yet been reported
    assert len(finished) < len(jobs)
    lines = logged(tmp_path / "log")
    assert lines[-1]["event"] == "end"
    for name, state in states(report).items():
        assert states_in(lines, name)[-1] == state
    before = {name: untouched(tmp_path / "out" / name) for name in finished}

    code, report, _ = batch(jobs)

    assert code == exits.OK
    assert {
        name.removeprefix("out/") for name, state in states(report).items() if state == "kept"
    } == finished
    assert {name: untouched(tmp_path / "out" / name) for name in finished} == before
    interrupted = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert batch(jobs)[0] == exits.OK
    assert contents(tmp_path / "out") == interrupted


def test_what_a_pass_had_written_when_it_was_interrupted_is_taken_up(
    three, base, batch, tmp_path, monkeypatch
):
    three[1]["max_shard_size"] = "30KB"
    assert batch(three, base=base)[0] == exits.OK
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    n_done = 0

    def done(self, name):
        nonlocal n_done
        n_done += 1
        if n_done == 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_Plain, "done", done)
        code, report, said = batch(three, base=base)

    assert code == exits.INTERRUPTED
    assert set(states(report).values()) == {"not run"}
    assert "error: interrupted" in said
    left = leftovers(tmp_path / "out")
    assert left
    assert all(name.endswith(SUFFIX) for name in left)
    listed = {name.removesuffix(SUFFIX): journal.count(Folder.of(tmp_path / "out" / name)) for name in left}

    code, report, _ = batch(three, base=base)

    assert code == exits.OK
    resumed = {
        Path(job["out"]).name: int(re.search(r"written (\d+) of", issue["sentence"])[1])
        for job in report["jobs"]
        for issue in job["issues"]
        if issue["code"] == "resumed"
    }
    assert resumed == listed
    assert sum(listed.values()) >= 39
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "over an old one"])
def test_an_interrupt_once_an_output_has_its_name_leaves_nothing_beside_it(
    is_there, three, base, batch, tmp_path, monkeypatch
):
    if is_there:
        assert batch(three, base=base, dtype="bfloat16")[0] == exits.OK
    publish = publishing.publish

    def interrupted(stage):
        publish(stage)
        if stage.out.name == "bad":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lora_merge.storage.staging.publish", interrupted)
        code, report, _ = batch(three, "--overwrite", base=base)

    assert code == exits.INTERRUPTED
    assert states(report) == {"out/one": "done", "out/bad": "not run", "out/two": "not run"}
    assert leftovers(tmp_path / "out") == sorted(
        ["bad", "one", f"two{SUFFIX}", *(["two"] if is_there else [])]
    )
    code, report, _ = batch(three, "--overwrite", base=base)
    assert code == exits.OK
    assert states(report) == {"out/one": "kept", "out/bad": "kept", "out/two": "done"}
    assert leftovers(tmp_path / "out") == ["bad", "one", "two"]
