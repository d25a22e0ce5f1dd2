"""How many workers merge by default: they are tried while the merge runs, and no byte depends on it."""

from __future__ import annotations

import json

import pytest

from lora_merge.executors import pace, paced
from lora_merge.merging import budget
from lora_merge.runtime import machine


@pytest.fixture
def many_cores(monkeypatch):
    """Let twelve threads be started, and be tried after a few pieces, however small."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 12)
    monkeypatch.setattr(pace, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(pace, "_LEAST_ROUNDS", 1)


def contents(root):
    """Return the weight files of an output and their bytes."""
    found = {path.name: path.read_bytes() for path in root.glob("*.safetensors")}
    assert len(found) > 1
    return found


def merged(cli, base, adapter, out, *options):
    done = cli("--base", base, "--adapter", adapter, "--out", out, "--json", *options)
    return json.loads(done.stdout)


@pytest.mark.parametrize("gain", [-1e9, 1e9], ids=["more are kept", "more are given up"])
def test_bytes_are_those_of_one_worker_whatever_is_tried(
    gain, many_cores, monkeypatch, cli, pico, pico_adapter, tmp_path
):
    monkeypatch.setattr(pace, "_SHARE", gain)
    monkeypatch.setattr(budget, "FIRST_WORKERS", 1)
    tried = []

    class Noted(pace.Pace):
        def done(self, nbytes, now):
            tried.append(super().done(nbytes, now))
            return tried[-1]

    monkeypatch.setattr("lora_merge.merging.writing.Pace", Noted)
    base = pico("llama", max_shard_size="40KB")
    adapter = pico_adapter(base, target_modules="all-linear")
    alone = merged(cli, base, adapter, tmp_path / "one" / "out", "--workers", "1")
    assert (alone["workers"]["n"], alone["workers"]["why"]) == (1, "as asked for")
    report = merged(cli, base, adapter, tmp_path / "more" / "out")
    assert contents(tmp_path / "more" / "out") == contents(tmp_path / "one" / "out")
    assert report["summary"]["n_workers"] == report["workers"]["most"] == 12
    assert report["workers"]["n"] == tried[-1]
    first = tried[0]
    assert max(tried) > first
    if gain > 0:
        assert report["workers"]["n"] == first
        assert report["workers"]["why"].startswith(f"{max(tried)} finished ")
    else:
        assert report["workers"]["n"] == max(tried)


def test_workers_that_are_not_tried_never_run(many_cores, monkeypatch, cli, pico, pico_adapter, tmp_path):
    """So they have no buffers: memory is that of the workers that ran."""
    monkeypatch.setattr(pace, "_LEAST_ROUNDS", 10**6)
    served = set()
    real = paced._Queue.serve

    def serve(self, number, worker):
        def noted(piece):
            served.add(number)
            return worker(piece)

        real(self, number, noted)

    monkeypatch.setattr(paced._Queue, "serve", serve)
    base = pico()
    report = merged(cli, base, pico_adapter(base, target_modules="all-linear"), tmp_path / "out")
    assert served <= set(range(4))
    assert report["workers"] == {
        "n": 4,
        "most": 12,
        "device": "cpu",
        "device_why": report["workers"]["device_why"],
        "why": "the merge ended before more were tried",
    }


def test_the_profile_says_how_many_and_why(many_cores, cli, pico, pico_adapter, tmp_path):
    base = pico()
    done = cli("--base", base, "--adapter", pico_adapter(base), "--out", tmp_path / "out", "--profile")
    assert "Copying and merging, 4 workers together (" in done.stderr
