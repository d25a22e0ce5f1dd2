"""Processes and nodes that are lost, interrupts, and batches: real ones, in the middle of a merge."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from lora_merge.cli import exits
from lora_merge.storage.replaceable import SUFFIX
from lora_merge.storage.store_staging import FILES
from tests.ray.conftest import ROOT, STORE_BYTES, Run, kill, tasks_at_work
from tests.storages.dense import content

pytestmark = [pytest.mark.loopback, pytest.mark.system]


def begun(large, cluster, out, *more):
    return Run(*large.arguments(out, "--executor", "ray", "--ray-address", cluster.address, *more))


@pytest.mark.parametrize("n", [1, 3])
def test_a_process_that_is_killed_costs_its_own_file_only_once(large, cluster, tmp_path, n):
    run = begun(large, cluster, tmp_path / "out", "--json")
    kill(n, run)
    code, out, err = run.ended()
    assert code == 0, err
    # Ray tells of each process that died, and must not do so on stdout.
    assert json.loads(out)["verdict"]["n_tensors"]
    assert "raylet" not in err
    assert content(tmp_path / "out") == content(large.expected)


def test_a_node_that_is_lost_is_done_without(large, cluster, tmp_path):
    node = cluster.add()
    run = begun(large, cluster, tmp_path / "out")
    run.wait_for(tmp_path / "out", 3)
    cluster.remove(node)
    code, _, err = run.ended()
    assert code == 0, err
    assert content(tmp_path / "out") == content(large.expected)


def test_a_file_that_is_lost_too_often_ends_the_run_and_resume_keeps_the_others(large, cluster, tmp_path):
    out = tmp_path / "out"
    run = begun(large, cluster, out, "--retries", 0)
    run.wait_for(out, 3)
    # One that is killed when it has just sent its result is not missed.
    while run.process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            for pid in tasks_at_work():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    code, _, err = run.ended()
    assert code == exits.WRITE
    assert "was not made in 1 try on the Ray cluster: its process ended unexpectedly" in err
    assert "run again with --resume" in err
    assert not (out / "config.json").exists()
    # One that was killed between a file and its evidence has lost both.
    noted = {path.stem for path in (tmp_path / f"out{SUFFIX}" / FILES).iterdir()}
    kept = {out / name: (out / name).stat().st_mtime_ns for name in noted}
    assert len(kept) >= 3
    code, _, err = begun(large, cluster, out, "--resume").ended()
    assert code == 0, err
    assert "resumed" in err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(out) == content(large.expected)


def test_an_interrupt_cancels_the_tasks_and_keeps_what_is_finished(large, cluster, tmp_path):
    out = tmp_path / "out"
    run = begun(large, cluster, out)
    run.wait_for(out, 2)
    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.ended()
    assert code == exits.INTERRUPTED
    assert "run again with --resume to continue" in err
    assert "Traceback" not in err
    assert time.monotonic() - began < 30
    assert not tasks_at_work()
    there = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    time.sleep(1)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == there
    kept = {
        path: there[path]
        for path in there
        if (tmp_path / f"out{SUFFIX}" / FILES / f"{path.name}.json").exists()
    }
    assert kept
    assert not (out / "config.json").exists()
    code, _, err = begun(large, cluster, out, "--resume").ended()
    assert code == 0, err
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert content(out) == content(large.expected)


def test_jobs_of_a_batch_share_the_cluster(cluster, pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "bfloat16", "60KB")
    shared = {"base": str(base), "executor": "ray", "ray_address": cluster.address}
    jobs = [
        {**shared, "adapter": str(pico_adapter(base, r=2 + n)), "out": str(tmp_path / "many" / str(n))}
        for n in range(8)
    ]
    file = tmp_path / "jobs.yaml"
    file.write_text(json.dumps({"jobs": jobs}))
    code, out, err = Run("batch", file, "--json").ended()
    assert code == 0, err
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["done"] * 8
    for n, job in enumerate(jobs):
        one = tmp_path / "one" / str(n)
        assert cli("--base", base, "--adapter", job["adapter"], "--out", one).exit_code == 0
        assert content(tmp_path / "many" / str(n)) == content(one)
    code, out, err = Run("batch", file, "--json").ended()
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["kept"] * 8, err


def test_a_cluster_for_one_run_ends_with_it(large, tmp_path, ray):
    run = Run(*large.arguments(tmp_path / "out", "--executor", "ray", "--ray-address", "local"))
    code, _, err = run.ended()
    assert code == 0, err
    assert content(tmp_path / "out") == content(large.expected)
    assert not tasks_at_work()


def test_jobs_in_several_processes_share_a_cluster_that_is_started_for_them(
    pico, pico_adapter, cli, ray, tmp_path
):
    base = pico("llama", "bfloat16", "60KB")
    shared = {
        "base": str(base),
        "adapter": str(pico_adapter(base)),
        "executor": "ray",
        "ray_address": "local",
    }
    file = tmp_path / "jobs.yaml"
    file.write_text(
        json.dumps({"jobs": [{**shared, "out": str(tmp_path / name)} for name in ("one", "two")]})
    )
    run = Run("batch", file, "--jobs", 2, "--json")
    most = 0
    while run.process.poll() is None:
        most = max(most, n_clusters())
        time.sleep(0.1)
    code, out, err = run.ended()
    assert code == 0, err
    assert [job["state"] for job in json.loads(out)["jobs"]] == ["done"] * 2
    assert "Exception" not in err
    # Nothing else on this machine need be without one.
    assert most - n_clusters() == 1
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_cluster_that_is_gone_ends_the_run_with_a_sentence(large, ray, tmp_path):
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [
        Path(sys.executable).with_name("ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--block",
        f"--object-store-memory={STORE_BYTES}", "--include-dashboard=false", "--disable-usage-stats",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(start, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (server := gcs_of(port)) and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(3)
        arguments = large.arguments(
            tmp_path / "out", "--executor", "ray", "--ray-address", f"127.0.0.1:{port}"
        )
        run = Run(
            *arguments, before="from lora_merge.executors.ray import driving; driving.LOSS_SECONDS = 5.0"
        )
        run.wait_for(tmp_path / "out", 2)
        os.kill(server, signal.SIGKILL)
        code, _, err = run.ended()
    finally:
        head.terminate()
        head.wait()
    assert code == exits.WRITE, err
    assert "the Ray cluster does not answer any more" in err
    assert "run again with --resume" in err


def gcs_of(port):
    """Return the process that is the head of a cluster; 0 where there is none."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = entry.read_bytes().split(b"\0")
            if words[0].endswith(b"/gcs_server") and f"--gcs_server_port={port}".encode() in words:
                return int(entry.parent.name)
    return 0


def n_clusters():
    """Return how many clusters run on this machine: each has one process of this name."""
    found = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += entry.read_bytes().partition(b"\0")[0].endswith(b"/gcs_server")
    return found
