"""Run a command and tell what it took: ``launch.py FD COMMAND …`` writes JSON to a file descriptor.

A program of its own because the kernel counts a child's peak memory from its parent's: this one is small.
"""

from __future__ import annotations

import os
import sys
import time


def main(told_to: int, command: list[str]) -> None:
    began = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    wall_s = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    told = (
        f'{{"exit_code": {os.waitstatus_to_exitcode(status)}, "wall_s": {wall_s!r},'
        f' "cpu_s": {usage.ru_utime + usage.ru_stime!r}, "peak_rss_bytes": {usage.ru_maxrss * unit}}}'
    )
    os.write(told_to, told.encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
