"""Memory that runs out has one sentence, however it is said."""

from __future__ import annotations

import pytest

from lora_merge.core.shortage import memory_for
from lora_merge.errors import OutOfMemoryError


@pytest.mark.parametrize(
    ("exc", "where"),
    [
        (MemoryError(), "the machine"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "the machine"),
        (RuntimeError("can't start new thread"), "the machine"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU"),
    ],
)  # fmt: skip
def test_running_out_of_memory_names_what_it_was_for(exc, where):
    with (
        pytest.raises(OutOfMemoryError, match=f"merging x: {where} has no memory left") as caught,
        memory_for("merging x"),
    ):
        raise exc

    assert "--memory-limit" in caught.value.hint


def test_torch_really_says_it_so():
    import torch

    with pytest.raises(OutOfMemoryError), memory_for("merging x"):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_what_was_named_closer_by_stays():
    with pytest.raises(OutOfMemoryError, match="merging x"), memory_for("writing"), memory_for("merging x"):
        raise MemoryError


def test_another_error_is_left_alone():
    with pytest.raises(RuntimeError, match="shape"), memory_for("merging x"):
        raise RuntimeError("shape mismatch")
