"""`--memory-limit`, `--workers` and `--profile`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

from lora_merge.cli import exits


@pytest.fixture
def arguments(pico, pico_adapter):
    base = pico()
    return "--base", base, "--adapter", pico_adapter(base, target_modules="all-linear")


def test_a_limit_that_one_worker_does_not_fit_into_is_refused_before_anything_is_written(
    arguments, cli, tmp_path
):
    result = cli(*arguments, "--out", tmp_path / "out", "--memory-limit", "100MB")
    assert result.exit_code == exits.USAGE
    assert "memory_limit: is 100.0 MB, but one worker needs about" in result.stderr
    assert "hint: raise --memory-limit, or leave it out" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_limit_costs_workers_and_changes_no_byte(arguments, cli, tmp_path):
    plans = {}
    for name, options in {"free": (), "tight": ("--memory-limit", "280MB")}.items():
        result = cli(*arguments, "--out", tmp_path / name, "--workers", "40", "--json", *options)
        assert result.exit_code == 0, result.stderr
        plans[name] = json.loads(result.stdout)["summary"]
    assert plans["free"]["n_workers"] == 40
    assert plans["tight"]["n_workers"] < 40
    assert plans["tight"]["peak_bytes"] <= 280_000_000 < plans["free"]["peak_bytes"]
    one, other = (tmp_path / name / "model.safetensors" for name in plans)
    assert one.read_bytes() == other.read_bytes()


def test_a_limit_that_is_no_size_is_usage(cli):
    result = cli("--adapter", "x", "--out", "y", "--memory-limit", "lots")
    assert result.exit_code == exits.USAGE
    assert "'lots' is not a size" in result.stderr


def test_a_profile_says_where_each_second_went(arguments, cli, tmp_path):
    result = cli(*arguments, "--out", tmp_path / "out", "--profile", "--workers", "2")
    assert result.exit_code == 0
    phases, stages = result.stderr.split("Copying and merging, 2 workers together (as asked for):")
    for word in ("plan", "copy", "load", "merge", "seal", "verify", "flush", "publish"):
        assert re.search(rf"^  {word} +\d+\.\d\d  \S", phases, re.MULTILINE), word
    for stage in ("read", "decode", "change", "encode", "digest", "write"):
        assert re.search(rf"^  {stage} +\d+\.\d\d  \S", stages, re.MULTILINE), stage
    assert result.stdout == ""


def test_seconds_of_every_phase_and_stage_are_in_the_report(arguments, cli, tmp_path):
    report = json.loads(cli(*arguments, "--out", tmp_path / "out", "--json").stdout)
    assert list(report["seconds"]) == ["plan", "copy", "merge", "load", "seal", "verify", "flush", "publish"]
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert {"copy", "digest", "read", "change", "write"} <= report["busy_seconds"].keys()
    assert 0 < sum(report["busy_seconds"].values()) < 60


@pytest.mark.system
def test_the_phases_of_a_profile_add_up_to_the_life_of_the_process(arguments, tmp_path):
    command = [sys.executable, "-m", "lora_merge", *map(str, arguments), "--out", str(tmp_path / "out")]
    began = time.perf_counter()
    result = subprocess.run([*command, "--profile", "--quiet"], capture_output=True, text=True, check=True)
    wall = time.perf_counter() - began
    phases, _ = result.stderr.split("Copying and merging")
    found = {word: float(took) for word, took in re.findall(r"^  (\w+) +(\d+\.\d\d)", phases, re.MULTILINE)}
    total = found.pop("all")
    assert next(iter(found)) == "start"
    assert found["other"] < 0.05 * total + 0.05
    assert abs(sum(found.values()) - total) < 0.005 * (len(found) + 1)
    # What is not in it is the exit, and the start of the process by this one.
    assert 0.95 * wall - 0.1 < total < wall + 0.02


def test_within_another_program_a_profile_is_of_the_merge_alone(arguments, cli, tmp_path):
    result = cli(*arguments, "--out", tmp_path / "out", "--profile", "--quiet")
    assert not re.search(r"^  (start|other) ", result.stderr, re.MULTILINE)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems are not asked since when a process runs")
def test_the_age_of_a_process_counts_from_its_start():
    code = "import time; time.sleep(0.5); from lora_merge.runtime.age import age; print(age())"
    began = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 0.5 <= float(told) <= time.perf_counter() - began + 0.02
