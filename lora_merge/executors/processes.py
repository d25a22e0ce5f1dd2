"""Worker processes: `Crew` for large pieces of work, where one that dies fails its own piece only; `run_processes` for those of
one merge. All end when their parent does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from lora_merge.errors import BugError, LoraMergeError, WriteError
from lora_merge.runtime.shortage import mind_limits
from lora_merge.runtime.streams import guard

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from lora_merge.core import work

Work = TypeVar("Work")
Result = TypeVar("Result")

_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What a terminal sends to all of its processes. One that is still importing would die of it, or print a traceback."""

_PR_SET_PDEATHSIG = 1
"""The request of Linux's ``prctl(2)``."""

_INTERRUPTED = 130

_PATIENCE_SECONDS = 10.0
"""Until a process that is to end, and has no work any more, is ended."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A piece of work that has no result."""

    kind: str
    """Of the error; empty where the process ended without one, as it does when it is interrupted before it has begun."""

    text: str
    """What the error says; of a process that ended, how."""

    traceback: str = ""


class Crew(Generic[Work, Result]):
    """Some processes, each of which does one piece of work after the other.

    A context; leaving it ends them. They are started as they are needed, by the thread that calls `begin`, which has to
    last as long as they do. Interrupts that a terminal sends to all of its processes are the parent's to pass on
    (`interrupt`).

    Args:
        do: does one piece; a function of a module, which travels by its name, or something that can be pickled.
        n: how many processes, at most.
        is_deaf: leave all signals to the parent, ``SIGTERM`` too, which a service manager sends to each process.
    """

    def __init__(self, do: Callable[[Work], Result], n: int, *, is_deaf: bool = False) -> None:
        from multiprocessing import get_context, resource_tracker

        resource_tracker.ensure_running()  # else the first process to start does it, and unblocks signals meanwhile
        self._context = get_context("spawn")
        self._do, self._n, self._is_deaf = do, n, is_deaf
        self._hands: list[_Hand[Work, Result]] = []
        self._lifeline, self._end = self._context.Pipe(duplex=False)
        self._news: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for hand in self._hands:
            hand.pipe.close()
        for hand in self._hands:
            hand.process.join(_PATIENCE_SECONDS)
            if hand.process.is_alive():
                hand.process.kill()
                hand.process.join()
        self._end.close()
        self._lifeline.close()

    @property
    def has_room(self) -> bool:
        """Return True when another piece could be begun at once."""
        return self._n_busy() < self._n

    @property
    def is_idle(self) -> bool:
        """Return True when nothing is under way."""
        return not self._n_busy()

    def _n_busy(self) -> int:
        return sum(hand.is_busy for hand in self._hands)

    def begin(self, work: Work) -> None:
        """Have a process begin a piece of work; there must be room for it."""
        hand = next((hand for hand in self._hands if not hand.is_busy), None) or self._start()
        hand.work = [work]
        with _held_back():  # an interrupt in the middle of a message would leave half of it in the pipe
            threading.Thread(target=hand.carry, args=(work, self._news), daemon=True).start()

    def results(self) -> list[tuple[Work, Result | Broken]]:
        """Wait until a piece of work is done, or has failed; return what is known by then."""
        while not (done := [hand for hand in self._hands if hand.is_busy and hand.found]):
            self._news.get()
        found = [(hand.work.pop(), hand.found.pop()) for hand in done]
        self._hands = [hand for hand in self._hands if not hand.is_gone]
        return found

    def interrupt(self) -> None:
        """Interrupt those that are at work, as Ctrl-C would; each is to return what it has by then."""
        for hand in self._hands:
            if hand.is_busy and hand.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(hand.process.pid, signal.SIGINT)

    def _start(self) -> _Hand[Work, Result]:
        """Start a process; it has its own end of the pipe and no other, so that each end closes with its owner."""
        ours, its = self._context.Pipe()
        arguments = (self._do, its, self._lifeline, os.getpid(), self._is_deaf)
        process = self._context.Process(target=_serve, args=arguments, name="lora-merge")
        with _held_back():
            process.start()
        its.close()
        hand: _Hand[Work, Result] = _Hand(process, ours)
        self._hands.append(hand)
        return hand


class _Hand(Generic[Work, Result]):
    """A process, seen from its parent."""

    def __init__(self, process: BaseProcess, pipe: Connection[Any, Any]) -> None:
        self.process, self.pipe = process, pipe
        self.work: list[Work] = []
        """What it does; empty when it is idle."""

        self.found: list[Result | Broken] = []
        """What became of that, once it is known."""

        self.is_gone = False

    @property
    def is_busy(self) -> bool:
        """Return True from when it is given work until its result is taken."""
        return bool(self.work)

    def carry(self, work: Work, news: SimpleQueue[None]) -> None:
        """Give it the work, and wait for the result. Runs in a thread of its own."""
        try:
            self.pipe.send(work)
            self.found.append(self.pipe.recv())
        except (EOFError, OSError):
            self.is_gone = True
            self.process.join()
            self.found.append(Broken("", _how_it_ended(self.process.exitcode)))
        except Exception as exc:  # noqa: BLE001 - what does not travel has no result
            self.is_gone = True
            self.process.kill()
            self.found.append(Broken(type(exc).__name__, str(exc), traceback.format_exc()))
        news.put(None)


def _how_it_ended(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _serve(
    do: Callable[[Any], Any],
    pipe: Connection[Any, Any],
    lifeline: Connection[Any, Any],
    parent: int,
    is_deaf: bool = False,
) -> None:
    """Do one piece of work after the other, until the other end of the pipe is closed."""
    guard()
    mind_limits()
    _end_with(parent, lifeline)
    if signal.SIGINT in signal.sigpending():
        os._exit(_INTERRUPTED)
    be_idle(is_deaf=is_deaf)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            work = pipe.recv()
            answer = _answer(do, work)
            be_idle(is_deaf=is_deaf)
            pipe.send_bytes(answer)


def _answer(do: Callable[[Any], Any], work: object) -> memoryview:
    """Return what is done, or what kept it from being done, as it travels."""
    from multiprocessing.reduction import ForkingPickler

    try:
        return ForkingPickler.dumps(do(work))
    except Exception as exc:  # noqa: BLE001 - whatever it is, the parent is to say it
        return ForkingPickler.dumps(Broken(type(exc).__name__, str(exc), traceback.format_exc()))


def be_idle(*, is_deaf: bool = False) -> None:
    """Let interrupts pass, which are meant for those that work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if is_deaf else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)


def _end_with(parent: int, lifeline: Connection[Any, Any]) -> None:
    """End this process when its parent ends, whatever ended that.

    Linux does it by itself. Elsewhere a thread waits for the end of a pipe whose other end only the parent has. The kill
    is as hard as the parent's end was: what is staged can be resumed after one.
    """
    threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(lifeline: Connection[Any, Any]) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv()
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """Take signals only after the block; a process that starts in it takes none until it says so itself.

    A signal that this thread blocks goes to another that does not (those of numerical libraries, for one), and Python then
    runs its handler here all the same. So the handlers wait, too.
    """
    struck: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        ours = {signum: signal.getsignal(signum) for signum in _HELD_BACK}
        handlers = {signum: handler for signum, handler in ours.items() if callable(handler)}
        for signum in handlers:
            signal.signal(signum, lambda number, _: struck.append(number))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in struck:
            signal.raise_signal(number)


def run_processes(
    spec: work.WorkerSpec[work.Work, work.Result], pieces: Sequence[work.Work], n_workers: int
) -> Generator[work.Result, None, None]:
    """Yield the result of each piece as it is done, each worker in a process.

    Each process imports what its worker needs, torch above all, which takes seconds and some hundred MB: this pays where
    threads stand in each other's way, and proves that work travels. A program that calls this needs the usual
    ``if __name__ == "__main__":``, since each process imports its main module.

    On an error, or when the caller stops listening, pieces that are under way are waited for, as with threads.

    Raises:
        LoraMergeError: what a worker raised.
        BugError: a worker raised something else.
        WriteError: a process ended before its time, or cannot be started.
    """
    if not pieces:
        return
    waiting = deque(pieces)
    crew: Crew[work.Work, work.Result | _Raised] = Crew(
        _Worker(spec), min(n_workers, len(pieces)), is_deaf=True
    )
    with crew:
        try:
            while waiting or not crew.is_idle:
                while waiting and crew.has_room:
                    _begin(crew, waiting.popleft())
                for _, found in crew.results():
                    yield _result(found)
        finally:
            while not crew.is_idle:
                crew.results()


def _begin(crew: Crew[Work, Result], piece: Work) -> None:
    try:
        crew.begin(piece)
    except OSError as exc:
        raise WriteError(
            f"no process can be started for a worker ({exc.strerror})", hint="--executor threads needs none"
        ) from exc


class _Worker(Generic[Work, Result]):
    """Does pieces in a process of its own, where the worker is made before the first one."""

    def __init__(self, spec: work.WorkerSpec[Work, Result]) -> None:
        self._spec = spec
        self._stack = contextlib.ExitStack()
        self._made: list[Callable[[Work], Result]] = []

    def __call__(self, piece: Work) -> Result | _Raised:
        try:
            if not self._made:
                self._made += self._stack.enter_context(self._spec.make(1))  # until the process ends
            return self._made[0](piece)
        except LoraMergeError as exc:
            return _Raised(exc)


@dataclass(frozen=True, slots=True)
class _Raised:
    """An error that a user can fix, on its way to the parent, which raises it again."""

    error: LoraMergeError


def _result(found: Result | _Raised | Broken) -> Result:
    """Return a result that is one.

    Raises:
        LoraMergeError: it is an error, or what is known of a process that ended.
    """
    match found:
        case _Raised(error):
            raise error
        case Broken("", text):
            raise WriteError(
                f"the process of a worker ended before its time ({text}), perhaps for want of memory",
                hint="fewer --workers take less of it",
            )
        case Broken(kind, text, traceback):
            raise BugError(kind, text, traceback)
    return found
