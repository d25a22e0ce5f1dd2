"""Run a job on disks of many sizes that it does not fit on, then with room, and compare: ``filling JOB`` prints what it found.

Each size is a filesystem in memory of its own, where that may be mounted; elsewhere files may not become longer than that.
Every second one has room as long as the job looks for it, and is filled by others while it works.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.trial import Ended, Job, Trial, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FULL = {5, 7}
"""Exit codes: of a merge or a conversion, of a batch."""

_ROOM = 256 << 20


class Filling:
    """A job on disks of many sizes.

    Args:
        trial: the job, in a directory that may be mounted.
        can_mount: this process may do that.
    """

    def __init__(self, trial: Trial, *, can_mount: bool) -> None:
        self._trial, self._can_mount = trial, can_mount

    def once(self, share: float, *, seems_empty: bool) -> Iterator[str]:
        """Run it on a disk that has a share of what it needs, then on one with room; yield what happened."""
        trial = self._trial
        trial.clear()
        nbytes = int(share * self.most())
        with self._disk() as resize:
            resize(nbytes)
            done = run(trial.arguments, lambda: self._prepared(nbytes, seems_empty=seems_empty))
            yield from self._look(done)
            resize(_ROOM)
            if trial.is_new():
                trial.clear()
            yield from trial.again()

    def most(self) -> int:
        """Return the bytes that are needed: on a mounted disk all of them, else those of the largest file."""
        sizes = self._sizes
        return sum(sizes) if self._can_mount else max(sizes)

    @property
    def _sizes(self) -> list[int]:
        return [size + 4096 for size in self._trial.sizes]

    def _prepared(self, nbytes: int, *, seems_empty: bool) -> Callable[[], int]:
        if not self._can_mount:
            resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.RLIM_INFINITY))
        if seems_empty:
            usage = shutil.disk_usage("/")._replace(free=1 << 40)
            shutil.disk_usage = lambda path: usage  # type: ignore[assignment]
        return lambda: 0

    @contextlib.contextmanager
    def _disk(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that gives the disk so many free bytes."""
        work = self._trial.work
        if not self._can_mount:
            yield lambda nbytes: None
            return
        aside = work.with_name("aside")
        shutil.copytree(work, aside)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", work], check=True)
        try:
            shutil.copytree(aside, work, dirs_exist_ok=True)
            shutil.rmtree(aside)
            used = shutil.disk_usage(work).used

            def resize(nbytes: int) -> None:
                size = (used + nbytes) // 4096 * 4096 + 4096
                subprocess.run(["mount", "-o", f"remount,size={size}", work], check=True)

            yield resize
        finally:
            subprocess.run(["umount", work], check=True)

    def _look(self, done: Ended) -> Iterator[str]:
        if done.calls < 0:
            yield f"broken: {done.text}"
        if done.code in FULL:
            yield "full"
        elif done.code:
            yield f"broken: it ended with {done.code}: {done.text}"
        else:
            yield "fitted"
        if "Traceback" in done.text or "internal error in lora-merge" in done.text:
            yield f"broken: {done.text}"
        yield from self._trial.left()


def main() -> None:
    """Carry out ``{"job": {…}, "work": DIR, "n": N, "mount": BOOL}``."""
    told = json.loads(sys.argv[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    torch.set_num_threads(1)
    filling = Filling(Trial(Job(**told["job"]), Path(told["work"])), can_mount=told["mount"])
    n = told["n"]
    words = [word for k in range(n) for word in filling.once(1.1 * (k + 0.5) / n, seems_empty=bool(k % 2))]
    sys.stdout.write(json.dumps({word: words.count(word) for word in sorted(set(words))}))


if __name__ == "__main__":
    main()
