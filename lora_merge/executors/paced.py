"""Worker threads, as many at a time as get more done."""

from __future__ import annotations

import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING, Generic, NoReturn

from lora_merge.core.work import Result, Work

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from lora_merge.core.work import WorkerSpec
    from lora_merge.executors.pace import Pace


def run_paced(
    spec: WorkerSpec[Work, Result], pieces: Sequence[Work], n_workers: int, pace: Pace
) -> Generator[Result, None, None]:
    """Yield the result of each piece, in the order in which they finish.

    On an error, or when the caller stops listening, pieces that have not begun are dropped.

    Args:
        spec: makes the workers.
        pieces: all of the work; it is begun in this order.
        n_workers: how many there may be at most.
        pace: hears of each finished piece, and says how many may run.
    """
    if not pieces:
        return
    with spec.make(min(n_workers, len(pieces))) as workers:
        queue: _Queue[Work, Result] = _Queue(pieces, pace)
        threads = [
            threading.Thread(target=queue.serve, args=(number, worker), name=f"merge_{number}")
            for number, worker in enumerate(workers)
        ]
        begun = []
        try:
            for thread in threads:
                begun.append(thread)
                thread.start()
            for _ in pieces:
                yield queue.result()
        finally:
            # Pieces under way are waited for: they use the workers, whose context ends next.
            queue.close()
            for thread in begun:
                if thread.ident is not None:  # an interrupt may have kept the last from its start
                    thread.join()


class _Queue(Generic[Work, Result]):
    """Pieces that are left, for several threads. The first threads are served, as many as the pace allows."""

    def __init__(self, pieces: Sequence[Work], pace: Pace) -> None:
        self._left, self._pace = deque(pieces), pace
        self._changed = threading.Condition()
        self._results: SimpleQueue[Callable[[], Result]] = SimpleQueue()

    def serve(self, number: int, worker: Callable[[Work], Result]) -> None:
        """Have a worker do pieces until none is left. To be called in its thread.

        Args:
            number: of the worker, from 0. Low numbers come first: a worker that never runs has no buffers.
            worker: does a piece.
        """
        while (piece := self._next(number)) is not None:
            try:
                self._results.put(_returning(worker(piece)))
            except BaseException as exc:  # noqa: BLE001 - raised again where the results are taken
                self.close()
                self._results.put(_raising(exc))
                return
            with self._changed:
                before = self._pace.n
                if self._pace.done(piece.nbytes, time.monotonic()) != before:
                    self._changed.notify_all()

    def _next(self, number: int) -> Work | None:
        """Return the next piece, as soon as this worker may have one; None where none is left."""
        with self._changed:
            while self._left and number >= self._pace.n:
                self._changed.wait()
            if not self._left:
                self._changed.notify_all()
                return None
            return self._left.popleft()

    def result(self) -> Result:
        """Wait for the result of a piece, and return it.

        Raises:
            BaseException: what its worker raised.
        """
        return self._results.get()()

    def close(self) -> None:
        """Drop the pieces that have not begun."""
        with self._changed:
            self._left.clear()
            self._changed.notify_all()


def _returning(result: Result) -> Callable[[], Result]:
    return lambda: result


def _raising(exc: BaseException) -> Callable[[], NoReturn]:
    def fail() -> NoReturn:
        raise exc

    return fail
