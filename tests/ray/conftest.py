"""A Ray cluster of two nodes on this machine, with a store of S3 beside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from lora_merge.storage.replaceable import SUFFIX
from lora_merge.storage.store_staging import FILES
from tests.ray import files
from tests.storages.conftest import case  # noqa: F401 - a fixture
from tests.stores.conftest import environment_of, moto, moto_endpoint  # noqa: F401 - fixtures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
STORE_BYTES = 80_000_000
"""Of a node's object store: about the least that Ray allows."""


@pytest.fixture(scope="session")
def ray() -> Any:
    """Return the package."""
    return pytest.importorskip("ray", reason="needs Ray, in an environment that sees this one: make ray")


@pytest.fixture(autouse=True)
def allowed(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray look for the address of this machine, for which it asks a socket and sends nothing."""
    monkeypatch.delenv("SOCKET_LOG", raising=False)


class Nodes(NamedTuple):
    """A running cluster."""

    address: str
    add: Callable[..., Any]
    remove: Callable[..., None]


@pytest.fixture(scope="session")
def cluster(ray: Any, moto_endpoint: str) -> Iterator[Nodes]:  # noqa: F811 - the fixture of that name
    """Start two nodes with a CPU each. Their processes see this source tree, and moto."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # What tasks have is what the nodes were started with.
        for name, value in environment_of(moto_endpoint).items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        patch.delenv("SOCKET_LOG", raising=False)
        started = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False},
        )
        add = lambda **more: started.add_node(**{"num_cpus": 1, "object_store_memory": STORE_BYTES, **more})  # noqa: E731 - a tuple has it
        add()
        yield Nodes(started.address, add, lambda node: started.remove_node(node, allow_graceful=False))
        started.shutdown()


@pytest.fixture(scope="module")
def connected(cluster: Nodes) -> Iterator[str]:
    """Keep one connection for the tests of a module, so that their tasks find warm processes; return the address."""
    from lora_merge import executors
    from lora_merge.executors.ray import connect

    with pytest.MonkeyPatch.context() as patch, executors.connections():
        patch.delenv("SOCKET_LOG", raising=False)
        connect(cluster.address)
        yield cluster.address


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> files.Large:
    """Return a merge of files that take a while, and what one process makes of it."""
    return files.build(tmp_path_factory.mktemp("large"))


_MAIN = "import sys; from lora_merge.cli import main; main(sys.argv[1:], prog_name='lora-merge')"


class Run:
    """A run of the command in another process.

    Args:
        arguments: of the command.
        before: code that the process runs first.
    """

    def __init__(self, *arguments: object, before: str = "") -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        env.pop("SOCKET_LOG", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"{before}\n{_MAIN}", *map(str, arguments)],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end; return the exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=300)
        return self.process.returncode, out, err

    def wait_for(self, out: Path, n: int) -> None:
        """Wait until a number of files is finished: each has its evidence, which is put after the file itself."""
        evidence = out.parent / f"{out.name}{SUFFIX}" / FILES
        until = time.monotonic() + 120
        while len(list(evidence.glob("*.json"))) < n:
            assert self.process.poll() is None, self.ended()
            assert time.monotonic() < until
            time.sleep(0.005)


def tasks_at_work() -> set[int]:
    """Return the processes of this machine that are at work on a task of a merge: Ray names them so meanwhile."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = entry.read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::carry_out"):
            found.add(int(entry.parent.name))
    return found


def kill(n: int, run: Run) -> None:
    """Kill a number of processes, one after the other, each in the middle of a task."""
    killed: set[int] = set()
    until = time.monotonic() + 120
    while len(killed) < n:
        assert run.process.poll() is None, run.ended()
        assert time.monotonic() < until
        for pid in sorted(tasks_at_work() - killed)[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.3)
