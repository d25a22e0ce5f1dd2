"""`--memory-limit`, `--workers` and `--profile`."""

from __future__ import annotations

import json
import re

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
    phases, stages = result.stderr.split("Copying and merging, 2 workers together:")
    for word in ("plan", "copy", "load", "merge", "seal", "verify", "flush", "publish"):
        assert re.search(rf"^  {word} +\d+\.\d\d  \S", phases, re.MULTILINE), word
    for stage in ("read", "decode", "change", "encode", "digest", "write"):
        assert re.search(rf"^  {stage} +\d+\.\d\d  \S", stages, re.MULTILINE), stage
    assert result.stdout == ""


def test_seconds_of_every_phase_and_stage_are_in_the_report(arguments, cli, tmp_path):
    report = json.loads(cli(*arguments, "--out", tmp_path / "out", "--json").stdout)
    assert list(report["seconds"]) == ["plan", "copy", "load", "merge", "seal", "verify", "flush", "publish"]
    assert all(seconds >= 0 for seconds in report["seconds"].values())
    assert {"copy", "digest", "read", "change", "write"} <= report["busy_seconds"].keys()
    assert 0 < sum(report["busy_seconds"].values()) < 60
