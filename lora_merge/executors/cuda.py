"""Worker threads that share a GPU. Each has its own stream, so that one's copies overlap with another's kernels."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lora_merge.executors.threads import run_threads
from lora_merge.runtime.borrowed import Borrowed

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from lora_merge.core.work import Result, Work, WorkerSpec


def run_cuda(
    spec: WorkerSpec[Work, Result], pieces: Sequence[Work], n_workers: int, device: str = "cuda"
) -> Generator[Result, None, None]:
    """Yield the result of each piece, in the order in which they finish.

    Matrix products keep all bits of float32 (no TF32) meanwhile.

    Args:
        device: a CUDA device of torch's.
    """
    # TF32 keeps 10 bits of the mantissa, and a merge computes in float32.
    with _EXACT_PRODUCTS.changed():
        yield from run_threads(spec, pieces, n_workers, lambda: _begin(device))


@contextlib.contextmanager
def cuda_thread(device: str) -> Iterator[None]:
    """Set this thread up for one worker on a GPU, until the block ends.

    Args:
        device: a CUDA device of torch's.
    """
    with _EXACT_PRODUCTS.changed():
        _begin(device)
        yield


def _begin(device: str) -> None:
    import torch

    index = torch.device(device).index or 0
    # Both are settings of a thread, so each worker's thread makes them before its first piece.
    torch.cuda.set_device(index)
    torch.cuda.set_stream(torch.cuda.Stream(index))  # type: ignore[no-untyped-call]


def _allows_tf32() -> bool:
    import torch

    allowed: bool = torch.backends.cuda.matmul.allow_tf32
    return allowed


def _allow_tf32(allowed: bool) -> None:
    import torch

    torch.backends.cuda.matmul.allow_tf32 = allowed


_EXACT_PRODUCTS = Borrowed(_allows_tf32, _allow_tf32, value=False)
"""Several threads of a program may merge at the same time."""
