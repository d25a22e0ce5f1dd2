"""The driver of tasks: a bounded number of them under way, their results, and what to say when the cluster loses them."""

from __future__ import annotations

import contextlib
import pickle
import time
import uuid
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Generic

from lora_merge.core.work import Result, Work
from lora_merge.errors import LoraMergeError, PackageError, WriteError
from lora_merge.executors.processes import result_of
from lora_merge.executors.ray.cluster import answers
from lora_merge.executors.ray.demand import resources_text
from lora_merge.executors.ray.task import Begun, carry_out, versions
from lora_merge.runtime.packages import require
from lora_merge.words import counted

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from lora_merge.core.work import WorkerSpec
    from lora_merge.executors.ray.demand import Demand

PATIENCE_SECONDS: Final = 60.0
"""How long all tasks may wait for a place before the reason is said."""

LOSS_SECONDS: Final = 40.0
"""How long the head of a cluster may be away, to be started again. After 60 s Ray itself ends this process, and no message of ours is shown."""

_LOOK_SECONDS: Final = 1.0
"""How often the driver looks whether tasks wait for a place."""

_PULSE_SECONDS: Final = 2.0
"""How often the head of the cluster is asked whether it is there."""

_LEAVE_SECONDS: Final = 10.0
"""How long a task that is cancelled may take to end before its process is killed."""


@dataclass(slots=True)
class _Task(Generic[Work]):
    piece: Work
    has_begun: bool = False


def run_ray(
    spec: WorkerSpec[Work, Result], pieces: Sequence[Work], n_workers: int, demand: Demand
) -> Generator[Result, None, None]:
    """Yield the result of each piece, in the order in which they finish; each is a task on some node of the cluster.

    This process has to be connected (`cluster.connect`). What a task needs travels by name: the spec once, and each piece with its
    task. A task whose process or node is lost is begun again, and writes the same bytes.

    On an error, or when the caller stops listening, tasks under way are cancelled.

    Raises:
        LoraMergeError: what a worker raised.
        BugError: a worker raised something else.
        WriteError: a task was lost more often than it may be, or the cluster has no room for it.
        PackageError: a node lacks lora-merge.
    """
    if not pieces:
        return
    tasks = _Tasks(spec, n_workers, demand)
    waiting = deque(pieces)
    try:
        while waiting or tasks.under_way:
            while waiting and tasks.has_room:
                tasks.begin(waiting.popleft())
            yield from tasks.results()
    finally:
        tasks.cancel()


class _Tasks(Generic[Work, Result]):
    """The tasks of one run.

    Args:
        spec: of their workers.
        n_workers: how many may run at a time.
        demand: what each needs.
    """

    def __init__(self, spec: WorkerSpec[Work, Result], n_workers: int, demand: Demand) -> None:
        self._ray = ray = require("ray", "--executor ray")
        self._n_workers, self._demand = n_workers, demand
        self._remote = ray.remote(
            num_cpus=1,
            num_gpus=demand.n_gpus,
            memory=demand.memory_bytes,
            max_retries=demand.retries,
            # By default Ray fills one node after the other; the network of each is the limit.
            scheduling_strategy="SPREAD",
            num_returns="streaming",
        )(carry_out)
        self._run, self._spec = uuid.uuid4().hex, ray.put(pickle.dumps(spec))
        self._patience, self._pulse = _Patience(ray, demand), _Pulse(ray)
        self.under_way: dict[Any, _Task[Work]] = {}

    @property
    def has_room(self) -> bool:
        """True when another task may be begun: some wait in the cluster, so that no CPU of it waits for the driver."""
        if not self._pulse.is_there():
            return False
        if self._demand.is_limited:
            return len(self.under_way) < self._n_workers
        return len(self.under_way) < 2 * max(self._n_workers, self._pulse.n_cpus)

    def begin(self, piece: Work) -> None:
        """Hand a piece to the cluster."""
        task = self._remote.remote(
            self._run, versions(), [self._spec], pickle.dumps(piece), self._demand.device
        )
        self.under_way[task] = _Task(piece)

    def results(self) -> list[Result]:
        """Wait a moment for messages; return the results that are among them.

        Raises:
            LoraMergeError: see `run_ray`.
        """
        if not self._pulse.is_there():
            time.sleep(_LOOK_SECONDS)
            return []
        ready, _ = self._ray.wait(list(self.under_way), num_returns=1, timeout=_LOOK_SECONDS)
        found: list[Result] = []
        for task in ready:
            try:
                message = self._ray.get(next(task))
            except self._ray.exceptions.RayError as exc:
                raise _lost(self._ray, exc, self.under_way[task].piece, self._demand) from exc
            if isinstance(message, Begun):
                self.under_way[task].has_begun = True
            else:
                del self.under_way[task]
                found.append(result_of(message))
        self._patience.look(is_at_work=bool(found) or any(task.has_begun for task in self.under_way.values()))
        return found

    def cancel(self) -> None:
        """Cancel what is under way, and wait until it has ended: half a file must not appear afterwards."""
        tasks, self.under_way = list(self.under_way), {}
        if self._pulse.is_lost:
            return
        # The cluster may be gone, and with it the tasks.
        with contextlib.suppress(Exception):
            for task in tasks:
                self._ray.cancel(task, force=False)
            until = time.monotonic() + _LEAVE_SECONDS
            left = [task for task in tasks if not self._has_ended(task, until)]
            for task in left:
                self._ray.cancel(task, force=True)

    def _has_ended(self, task: Any, until: float) -> bool:
        """Take the messages of a cancelled task up to its end; return False where that takes too long."""
        while True:
            seconds = max(0.0, until - time.monotonic())
            ready, _ = self._ray.wait([task], timeout=seconds)
            if not ready:
                return False
            try:
                self._ray.get(next(task))
            except (StopIteration, self._ray.exceptions.RayError):
                return True


class _Pulse:
    """Knows whether the head of the cluster answers."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._next = self._seen = time.monotonic()
        self._is_there = True
        self.n_cpus = 0
        """Of all nodes, when it answered last."""

    @property
    def is_lost(self) -> bool:
        """True where it did not answer when it was asked last."""
        return not self._is_there

    def is_there(self) -> bool:
        """Return whether it answers; it is asked once in a few seconds.

        Raises:
            WriteError: it has not for `LOSS_SECONDS`.
        """
        now = time.monotonic()
        if now >= self._next:
            self._is_there = answers(self._ray)
            self._next = now + _PULSE_SECONDS
            # Nothing is asked for at any other time: Ray would wait for a head that is away.
            if self._is_there:
                self.n_cpus = int(self._ray.cluster_resources().get("CPU", 0))
        if self._is_there:
            self._seen = now
        elif now - self._seen >= LOSS_SECONDS:
            sentence = "the Ray cluster does not answer any more: its head was stopped or lost"
            raise WriteError(
                sentence, hint="start it, and run again with --resume to make only what is missing"
            )
        return self._is_there


class _Patience:
    """Knows for how long no task has had a place, and says why."""

    def __init__(self, ray: Any, demand: Demand) -> None:
        self._ray, self._demand = ray, demand
        self._since, self._has_told = time.monotonic(), False

    def look(self, *, is_at_work: bool) -> None:
        """Note whether some task works. Where none has for `PATIENCE_SECONDS`, tell why.

        Raises:
            WriteError: no node could ever have room for a task.
        """
        now = time.monotonic()
        if is_at_work:
            if self._has_told:
                self._demand.tell("")
            self._since, self._has_told = now, False
        elif now - self._since >= PATIENCE_SECONDS and not self._has_told:
            self._has_told = True
            self._tell()

    def _tell(self) -> None:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        needs, there = resources_text(self._demand.resources), resources_text(self._ray.cluster_resources())
        has = f"the cluster has {there} on {counted(len(nodes), 'node')}"
        if any(self._demand.fits(node) for node in nodes):
            free = resources_text(self._ray.available_resources())
            self._demand.tell(
                f"waiting for the cluster: a task needs {needs}; {has}, of which {free} are free"
            )
            return
        sentence = f"no node of the Ray cluster has room for a task: it needs {needs}, and {has}"
        raise WriteError(
            sentence,
            hint="add larger nodes, or pass a smaller --memory-limit; without --device cuda no GPU is needed",
        )


def _lost(ray: Any, exc: Exception, piece: Work, demand: Demand) -> LoraMergeError:
    """Return the error for a task without a result."""
    text = str(exc)
    if "No module named" in text or "ModuleNotFoundError" in text:
        line = next((line for line in reversed(text.splitlines()) if "No module named" in line), "").strip()
        hint = "install lora-merge on every node: in their image, or by the runtime_env of ray job submit"
        return PackageError(f"a node of the Ray cluster cannot run lora-merge ({line})", hint)
    name = getattr(piece, "name", "a piece of work")
    kinds = {
        ray.exceptions.OutOfMemoryError: "its node had no memory left",
        ray.exceptions.NodeDiedError: "its node was lost",
        ray.exceptions.WorkerCrashedError: "its process ended unexpectedly, perhaps because memory ran out",
        ray.exceptions.ObjectLostError: "the node with its result was lost",
        ray.exceptions.TaskCancelledError: "it was cancelled",
    }
    why = next((words for kind, words in kinds.items() if isinstance(exc, kind)), "")
    why = why or f"{type(exc).__name__}: {next(iter(text.strip().splitlines()), '')[:200]}"
    times = counted(demand.retries + 1, "try").replace("trys", "tries")
    hint = "run again with --resume to make only what is missing; --retries begins a lost task more often"
    return WriteError(f"{name}: was not made in {times} on the Ray cluster: {why}", hint=hint)
