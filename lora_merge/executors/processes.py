"""Worker processes: `Crew` for large pieces of work, `run_processes` for the pieces of one merge. All end when their parent does."""

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

_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
"""Signals that a terminal sends to all of its processes, and the alarm that may follow them (`interrupts.strike`). A
process that is still importing would die of one, or print a traceback.
"""

_PR_SET_PDEATHSIG = 1
"""The request of Linux's ``prctl(2)``."""

_INTERRUPTED = 130

_PATIENCE_SECONDS = 10.0
"""How long an idle process may take to end before it is killed."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A piece of work without a result: what went wrong."""

    kind: str
    """Class of the error; empty where the process ended without one, as when it is interrupted before it has begun."""

    text: str
    """The error's message, or how the process ended."""

    traceback: str = ""


class Crew(Generic[Work, Result]):
    """A few long-lived processes; each does one piece of work after the other. One that dies fails its own piece
    only.

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
        # A fork would copy locks that other threads hold.
        self._context = get_context("spawn")
        self._do, self._n, self._is_deaf = do, n, is_deaf
        self._hands: list[_Hand[Work, Result]] = []
        # Nothing is ever sent. The write end is only here, so it closes when this process ends, however it
        # ends.
        self._lifeline, self._end = self._context.Pipe(duplex=False)
        self._news: SimpleQueue[None] = SimpleQueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # A closed pipe tells an idle process to end. One that does not within `_PATIENCE_SECONDS` is killed.
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
        """True when another piece can be begun at once."""
        return self._n_busy() < self._n

    @property
    def is_idle(self) -> bool:
        """True when no piece is under way."""
        return not self._n_busy()

    def _n_busy(self) -> int:
        return sum(hand.is_busy for hand in self._hands)

    def begin(self, work: Work) -> None:
        """Have an idle process begin a piece of work, or a new one. `has_room` must be true."""
        hand = next((hand for hand in self._hands if not hand.is_busy), None) or self._start()
        hand.work = [work]
        with _held_back():  # an interrupt in the middle of a message would leave half of it in the pipe
            threading.Thread(target=hand.carry, args=(work, self._news), daemon=True).start()

    def results(self) -> list[tuple[Work, Result | Broken]]:
        """Wait until at least one piece is done or has failed. Return all that are, each with its result."""
        while not (done := [hand for hand in self._hands if hand.is_busy and hand.found]):
            self._news.get()
        found = [(hand.work.pop(), hand.found.pop()) for hand in done]
        self._hands = [hand for hand in self._hands if not hand.is_gone]
        return found

    def interrupt(self) -> None:
        """Send SIGINT to the processes that are at work, as Ctrl-C would. Each returns what it has by then."""
        for hand in self._hands:
            if hand.is_busy and hand.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(hand.process.pid, signal.SIGINT)

    def _start(self) -> _Hand[Work, Result]:
        """Start a process with its own pipe. Each end of a pipe has one owner, so it closes when its owner ends."""
        ours, its = self._context.Pipe()
        arguments = (self._do, its, self._lifeline, os.getpid(), self._is_deaf)
        # Each process has only its own pipe: one that is killed fails its own piece, and no other.
        process = self._context.Process(target=_serve, args=arguments, name="lora-merge")
        with _held_back():
            process.start()
        its.close()
        hand: _Hand[Work, Result] = _Hand(process, ours)
        self._hands.append(hand)
        return hand


class _Hand(Generic[Work, Result]):
    """One process, as its parent sees it."""

    def __init__(self, process: BaseProcess, pipe: Connection[Any, Any]) -> None:
        self.process, self.pipe = process, pipe
        self.work: list[Work] = []
        """The piece that it works on; empty when it is idle."""

        self.found: list[Result | Broken] = []
        """The result of that piece, once it is known."""

        self.is_gone = False

    @property
    def is_busy(self) -> bool:
        return bool(self.work)

    def carry(self, work: Work, news: SimpleQueue[None]) -> None:
        """Send the work and wait for the result. Runs in a separate thread, one for each piece."""
        try:
            self.pipe.send(work)
            self.found.append(self.pipe.recv())
        # The other end of the pipe closed: the process has ended, and its exit code says how.
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
    """The main function of a process: do pieces of work until the parent closes the pipe."""
    guard()
    mind_limits()
    _end_with(parent, lifeline)
    # An interrupt came while this process was still importing. It has no work yet, so it ends, quietly.
    if signal.SIGINT in signal.sigpending():
        os._exit(_INTERRUPTED)
    be_idle(is_deaf=is_deaf)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            work = pipe.recv()
            answer = _answer(do, work)
            # Before the answer is sent: from then on no interrupt is meant for this process.
            be_idle(is_deaf=is_deaf)
            pipe.send_bytes(answer)


def _answer(do: Callable[[Any], Any], work: object) -> memoryview:
    """Return the pickled result of a piece, or the pickled error."""
    from multiprocessing.reduction import ForkingPickler

    try:
        return ForkingPickler.dumps(do(work))
    except Exception as exc:  # noqa: BLE001 - whatever it is, the parent is to say it
        return ForkingPickler.dumps(Broken(type(exc).__name__, str(exc), traceback.format_exc()))


def be_idle(*, is_deaf: bool = False) -> None:
    """Ignore interrupts from the terminal: the parent passes them on to the processes that work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # of an interrupt that came just before
    signal.signal(signal.SIGTERM, signal.SIG_IGN if is_deaf else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)


def _end_with(parent: int, lifeline: Connection[Any, Any]) -> None:
    """End this process when its parent ends, for whatever reason.

    On Linux the kernel does it. Elsewhere a thread waits for the end of a pipe whose other end only the parent has.
    It is a kill: what is staged can be resumed afterwards.
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
    """Delay signals until the block ends. A process that starts inside begins with them blocked, until `be_idle`.

    Blocking alone is not enough. A signal that this thread blocks goes to another thread that does not (numerical
    libraries have some), and Python then runs the handler in the main thread anyway. So the handlers are
    replaced, too.
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
    """Yield the result of each piece, in the order in which they finish; each worker is a process.

    Each process imports what its worker needs, torch above all, which takes seconds and some hundred MB. It pays
    where threads hinder each other, and it shows that work can be sent elsewhere. A program that calls this needs the
    usual ``if __name__ == "__main__":``, since each process imports its main module.

    On an error, or when the caller stops listening, pieces that are under way are waited for, as with threads.

    Raises:
        LoraMergeError: what a worker raised.
        BugError: a worker raised something else.
        WriteError: a process ended unexpectedly, or cannot be started.
    """
    if not pieces:
        return
    waiting = deque(pieces)
    crew: Crew[work.Work, work.Result | Raised] = Crew(
        # is_deaf: signals are the parent's, also the SIGTERM that a service manager sends to each process.
        _Worker(spec),
        min(n_workers, len(pieces)),
        is_deaf=True,
    )
    with crew:
        try:
            while waiting or not crew.is_idle:
                while waiting and crew.has_room:
                    _begin(crew, waiting.popleft())
                for _, found in crew.results():
                    yield result_of(found)
        finally:
            while not crew.is_idle:
                crew.results()


def _begin(crew: Crew[Work, Result], piece: Work) -> None:
    try:
        crew.begin(piece)
    except OSError as exc:
        raise WriteError(
            f"cannot start a process for a worker ({exc.strerror})",
            hint="use --executor threads, which needs none",
        ) from exc


class _Worker(Generic[Work, Result]):
    """Does pieces in a process. The worker is made before the first one, and kept."""

    def __init__(self, spec: work.WorkerSpec[Work, Result]) -> None:
        self._spec = spec
        self._stack = contextlib.ExitStack()
        self._made: list[Callable[[Work], Result]] = []

    def __call__(self, piece: Work) -> Result | Raised:
        try:
            if not self._made:
                self._made += self._stack.enter_context(self._spec.make(1))  # until the process ends
            return self._made[0](piece)
        except LoraMergeError as exc:
            return Raised(exc)


@dataclass(frozen=True, slots=True)
class Raised:
    """A `LoraMergeError` on its way to the parent, which raises it again."""

    error: LoraMergeError


def result_of(found: Result | Raised | Broken) -> Result:
    """Return the result of a piece, or raise the error that came instead.

    Raises:
        LoraMergeError: the worker raised it, or the process ended unexpectedly.
        BugError: the worker raised something else.
    """
    match found:
        case Raised(error):
            raise error
        case Broken("", text):
            raise WriteError(
                f"a worker process ended unexpectedly ({text}), perhaps because memory ran out",
                hint="use fewer --workers, which need less memory",
            )
        case Broken(kind, text, traceback):
            raise BugError(kind, text, traceback)
    return found
