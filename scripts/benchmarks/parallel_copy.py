"""Copy the files of a folder by several threads, each a range at a time: ``parallel_copy.py FROM TO THREADS``."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RANGE_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20


def copy_range(source: int, target: int, start: int, end: int) -> None:
    """Copy some bytes from one open file to the same place of another."""
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while start < end:
        n = os.preadv(source, [buffer[: min(BLOCK_BYTES, end - start)]], start)
        if not n:
            raise EOFError
        done = 0
        while done < n:
            done += os.pwrite(target, buffer[done:n], start + done)
        start += n


def main(source: Path, target: Path, n_threads: int) -> None:
    """Copy every file."""
    target.mkdir(parents=True)
    files: list[int] = []
    ranges: list[tuple[int, int, int, int]] = []
    for path in sorted(path for path in source.iterdir() if path.is_file()):
        size = path.stat().st_size
        opened = (
            os.open(path, os.O_RDONLY),
            os.open(target / path.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644),
        )
        files += opened
        os.truncate(opened[1], size)
        ranges += [(*opened, at, min(at + RANGE_BYTES, size)) for at in range(0, size, RANGE_BYTES)]
    with ThreadPoolExecutor(n_threads) as pool:
        for future in [pool.submit(copy_range, *one) for one in ranges]:
            future.result()
    for fd in files:
        os.close(fd)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
