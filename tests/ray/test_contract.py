"""What every executor keeps, and what is said where a cluster cannot do what it is asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from lora_merge import api
from lora_merge.core.report import error
from lora_merge.core.work import Plain
from lora_merge.errors import (
    BugError,
    CheckpointError,
    RequestError,
    UnsupportedError,
    WriteError,
)
from lora_merge.executors.ray import Demand, connect, driving, run_ray
from tests.ray.conftest import ROOT, STORE_BYTES

pytestmark = pytest.mark.loopback

SMALL = Demand(100_000_000, retries=1)


@dataclass(frozen=True)
class Task:
    """A piece of work."""

    name: str
    nbytes: int = 1


@dataclass(frozen=True)
class Noted:
    """Workers that leave a file for each piece that they begin."""

    place: Path
    pause_seconds: float = 0.0
    failing: str = ""

    @contextlib.contextmanager
    def make(self, n):
        assert n == 1
        number = f"{os.getpid()}-{len(list(self.place.glob('*.made')))}"
        (self.place / f"{number}.made").touch()
        yield [self._work]

    def _work(self, task):
        (self.place / f"{task.name}.began").touch()
        if task.name == self.failing:
            raise UnsupportedError([error("odd", task.name, "is odd", "mend it")])
        threading.Event().wait(self.pause_seconds)
        return task.name, os.getpid()

    @property
    def began(self):
        return sorted(path.stem for path in self.place.glob("*.began"))


def tasks(n):
    return [Task(f"t{number:03}") for number in range(n)]


def divide(task):
    return 1 / (task.nbytes - 1)


def alone(mark, task):
    """Do a piece that fails where another one is under way."""
    mark.touch(exist_ok=False)
    threading.Event().wait(0.02)
    mark.unlink()


def die(task):
    os.kill(os.getpid(), 9)


def test_every_piece_is_done_once_and_a_process_makes_its_worker_once(connected, tmp_path):
    results = list(run_ray(Noted(tmp_path), tasks(40), 2, SMALL))
    assert sorted(name for name, _ in results) == [task.name for task in tasks(40)]
    assert len(list(tmp_path.glob("*.made"))) == len({pid for _, pid in results}) <= 2


def test_no_piece_begins_nothing(tmp_path):
    assert list(run_ray(Noted(tmp_path), [], 2, SMALL)) == []


def test_the_error_of_a_worker_comes_as_it_is_and_is_not_tried_again(connected, tmp_path):
    spec = Noted(tmp_path, 0.05, failing="t001")
    with pytest.raises(UnsupportedError, match="is odd") as caught:
        list(run_ray(spec, tasks(300), 2, SMALL))
    assert caught.value.hint == "mend it"
    assert "t001" in spec.began
    begun_by_then = spec.began
    assert len(begun_by_then) < 300
    threading.Event().wait(0.3)
    assert spec.began == begun_by_then


def test_when_the_caller_stops_listening_tasks_are_cancelled(connected, tmp_path):
    spec = Noted(tmp_path, 0.05)
    with closing(run_ray(spec, tasks(100), 2, SMALL)) as results:
        next(results)
    begun_by_then = spec.began
    assert len(begun_by_then) < 100
    threading.Event().wait(0.3)
    assert spec.began == begun_by_then


def test_no_more_tasks_are_under_way_than_may_be(connected, tmp_path):
    limited = Demand(100_000_000, is_limited=True)
    assert len(list(run_ray(Plain(partial(alone, tmp_path / "at work")), tasks(10), 1, limited))) == 10


def test_a_bug_on_a_node_comes_back_as_one(connected):
    with pytest.raises(BugError, match="ZeroDivisionError") as caught:
        list(run_ray(Plain(divide), tasks(1), 1, SMALL))
    assert "in divide" in caught.value.traceback


def test_a_task_that_always_dies_is_given_up(connected):
    with pytest.raises(WriteError, match=r"t000: was not made in 2 tries .*: its process ended unexpectedly"):
        list(run_ray(Plain(die), tasks(1), 1, SMALL))


def test_another_release_on_a_node_is_refused(connected, monkeypatch):
    monkeypatch.setattr(driving, "versions", lambda: "lora-merge 0.0.1 with torch 1.0")
    with pytest.raises(
        WriteError,
        match=r"node \S+ of the Ray cluster has lora-merge .*, and the driver has lora-merge 0.0.1",
    ):
        list(run_ray(Plain(divide), tasks(1), 1, SMALL))


def test_what_no_node_has_is_named(connected, monkeypatch):
    monkeypatch.setattr(driving, "PATIENCE_SECONDS", 1.0)
    with pytest.raises(
        WriteError,
        match=r"no node of the Ray cluster has room for a task: it needs 1 CPU, 1 GPU and 100.0 MB of memory, "
        r"and the cluster has 2 CPUs and \S+ GB of memory on 2 nodes",
    ):
        list(run_ray(Plain(divide), tasks(1), 1, Demand(100_000_000, device="cuda:0")))


def hold_both(ray, file):
    """Occupy the CPUs of both nodes while a file is there; return what is to be waited for."""
    file.touch()

    def hold(path):
        while os.path.exists(path):  # noqa: PTH110 - it runs elsewhere
            threading.Event().wait(0.1)

    other = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(hold)
    held = [other.remote(str(file)) for _ in range(2)]
    while ray.available_resources().get("CPU", 0):
        threading.Event().wait(0.05)
    return held


def test_a_cluster_that_is_busy_is_waited_for_and_the_reason_is_told(connected, ray, monkeypatch, tmp_path):
    monkeypatch.setattr(driving, "PATIENCE_SECONDS", 1.0)
    told = []
    held = hold_both(ray, tmp_path / "busy")

    def tell(sentence):
        told.append(sentence)
        (tmp_path / "busy").unlink(missing_ok=True)

    assert len(list(run_ray(Noted(tmp_path), tasks(1), 1, Demand(100_000_000, tell=tell)))) == 1
    assert told[0].startswith(
        "waiting for the cluster: a task needs 1 CPU and 100.0 MB of memory; the cluster has 2 CPUs"
    )
    assert "of which 0 CPUs" in told[0]
    assert told[1:] == [""]
    ray.get(held)


def command(*arguments, before=""):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("RAY_ADDRESS", None)
    code = (
        f"import sys\n{before}\nfrom lora_merge.cli import main\nmain(sys.argv[1:], prog_name='lora-merge')"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stderr


@pytest.mark.parametrize(
    ("address", "before", "sentence"),
    [
        ("127.0.0.1:9", "", "is 127.0.0.1:9, but no Ray cluster answers there (Connection refused)"),
        ("", "import ray; ray.__version__ = '2.1.0'", "whose Ray is"),
        ("", "sys.modules['ray'] = None", "--executor ray needs the package ray, which is not installed"),
        ("ray://10.0.0.1:10001", "", "is the address of Ray Client"),
        ("http://10.0.0.1:8265", "", "is the address of a dashboard"),
    ],
)
def test_what_cannot_be_connected_to_is_one_sentence(
    pico, pico_adapter, cluster, tmp_path, address, before, sentence
):
    base = pico()
    merge = ["--base", base, "--adapter", pico_adapter(base), "--out", tmp_path / "out", "--executor", "ray"]
    code, err = command(*merge, "--ray-address", address or cluster.address, before=before)
    assert code == 2
    assert sentence in err
    assert "hint: " in err
    assert len(err.splitlines()) <= 3
    assert not any(tmp_path.iterdir())


def test_no_cluster_says_how_to_start_one(monkeypatch, ray):
    from ray._private import services

    from lora_merge.executors.ray import cluster

    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def none(*_):
        raise ConnectionError

    monkeypatch.setattr(services, "get_ray_address_from_environment", none)
    with pytest.raises(RequestError, match="is auto, but no Ray cluster runs on this machine") as caught:
        cluster._reachable("auto")
    assert "ray start --head" in caught.value.hint
    assert "--ray-address local" in caught.value.hint


def test_one_process_uses_one_cluster(connected):
    with pytest.raises(RequestError, match="is local, but this process is connected to"):
        connect("local")


def test_a_program_that_is_connected_keeps_its_connection(cluster, pico, pico_adapter, tmp_path):
    base = pico()
    before = (
        f"import ray, atexit\nray.init('{cluster.address}', log_to_driver=False, logging_level=50)\n"
        "atexit.register(lambda: print('still', ray.is_initialized(), file=sys.stderr))"
    )
    code, err = command(
        "--base",
        base,
        "--adapter",
        pico_adapter(base),
        "--out",
        tmp_path / "out",
        "--executor",
        "ray",
        before=before,
    )
    assert code == 0, err
    assert "still True" in err


@contextlib.contextmanager
def other_machine(cluster, hidden):
    """Add a node from which a directory cannot be seen, and return how its tasks are asked for."""
    ray = shutil.which("ray", path=str(Path(sys.executable).parent))
    start = [
        ray, "start", f"--address={cluster.address}", "--num-cpus=1", "--block",
        f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats",
    ]  # fmt: skip
    script = f"mount -t tmpfs none {hidden} && exec {' '.join(start)}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@pytest.mark.system
@pytest.mark.parametrize("what", ["inputs", "output"])
def test_what_a_node_does_not_see_is_named_with_the_node(
    connected, cluster, ray, pico, pico_adapter, tmp_path, what
):
    if subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount (unshare --mount)")
    base = shutil.copytree(pico("llama", "bfloat16", "20KB"), tmp_path / "inputs" / "base")
    (tmp_path / "output").mkdir()
    merge = partial(
        api.merge,
        base=base,
        adapter=pico_adapter(base),
        out=tmp_path / "output" / "out",
        executor="ray",
        ray_address=connected,
    )
    before = len([node for node in ray.nodes() if node["Alive"]])
    held = hold_both(ray, tmp_path / "busy")
    with other_machine(cluster, tmp_path / what) as process:
        until = threading.Event()
        while len([node for node in ray.nodes() if node["Alive"]]) == before:
            assert process.poll() is None
            until.wait(0.2)
        if what == "inputs":
            with pytest.raises(
                CheckpointError, match=r"\.safetensors: is not on node \S+ of the Ray cluster"
            ) as caught:
                merge()
            assert "at the same path" in caught.value.hint
        else:
            with pytest.raises(WriteError, match=r"run.json: is not on node \S+, and the driver has made it"):
                merge()
        (tmp_path / "busy").unlink()
        ray.get(held)
