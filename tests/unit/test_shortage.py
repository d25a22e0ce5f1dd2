"""Memory that runs out has one sentence, however it is said."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from lora_merge.errors import OutOfMemoryError
from lora_merge.runtime.shortage import raise_if_out_of_memory, translate_out_of_memory


@pytest.mark.parametrize(
    ("exc", "where"),
    [
        (MemoryError(), "the machine"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), "the machine"),
        (RuntimeError("can't start new thread"), "the machine"),
        (RuntimeError("std::bad_alloc"), "the machine"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "the machine"),
        (ImportError("libx.so: cannot map zero-fill pages: Cannot allocate memory"), "the machine"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the machine"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the GPU"),
    ],
)  # fmt: skip
def test_running_out_of_memory_names_what_it_was_for(exc, where):
    with (
        pytest.raises(OutOfMemoryError, match=f"merging x: {where} has no memory left") as caught,
        translate_out_of_memory("merging x"),
    ):
        raise exc

    assert "--memory-limit" in caught.value.hint


def test_torch_really_says_it_so():
    import torch

    with pytest.raises(OutOfMemoryError), translate_out_of_memory("merging x"):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_what_was_named_closer_by_stays():
    with (
        pytest.raises(OutOfMemoryError, match="merging x"),
        translate_out_of_memory("writing"),
        translate_out_of_memory("merging x"),
    ):
        raise MemoryError


def test_another_error_is_left_alone():
    with pytest.raises(RuntimeError, match="shape"), translate_out_of_memory("merging x"):
        raise RuntimeError("shape mismatch")


def test_an_import_that_tells_it_by_another_error_is_understood():
    """As numpy does, and transformers' lazy modules."""
    told = RuntimeError("Failed to import transformers.modeling_utils")
    told.__cause__ = ImportError("libscipy_openblas64_.so: failed to map segment from shared object")

    with pytest.raises(OutOfMemoryError), translate_out_of_memory("merging x"):
        raise told


def test_an_error_that_only_follows_one_is_left_alone():
    later = KeyError("name")
    later.__context__ = MemoryError()

    with pytest.raises(KeyError), translate_out_of_memory("merging x"):
        raise later


@pytest.mark.parametrize("exc", [MemoryError(), RuntimeError("can't allocate memory")])
def test_a_library_that_fails_for_want_of_memory_says_nothing_of_its_input(exc):
    with pytest.raises(MemoryError):
        raise_if_out_of_memory(exc)

    raise_if_out_of_memory(ValueError("a rank that is negative"))


def test_a_configuration_is_not_called_unknown_because_memory_ran_out(monkeypatch):
    from lora_merge.modeling import skeleton

    def fails(config):
        raise MemoryError

    monkeypatch.setattr(skeleton, "parse_config", fails)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "of": "this test alone"}
    with pytest.raises(MemoryError):
        skeleton.build_skeleton(config)


def test_a_thread_without_memory_is_refused_before_it_could_hang():
    code = """
import resource, threading
from lora_merge.runtime.shortage import mind_limits
resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))
mind_limits()
first = threading.Thread(target=print, args=("begun",))
first.start()
first.join()
with open("/proc/self/statm") as file:
    now = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 12_000_000, 1 << 40))
try:
    threading.Thread(target=print).start()
except MemoryError as exc:
    print(exc)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "begun\nnot enough memory to start a thread\n"
