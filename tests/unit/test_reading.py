"""The reader of verification: several threads read the same files, and whole tensors are read once."""

from __future__ import annotations

import contextlib
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file

from lora_merge.checks import contents, reading
from lora_merge.checks.reading import Reader
from lora_merge.formats.safetensors import read_header

N_ROWS = 4096


@pytest.fixture
def refs(tmp_path):
    """Three tensors of one file; every row of each has another value."""
    rows = torch.arange(N_ROWS, dtype=torch.float32).view(-1, 1).expand(-1, 16)
    save_file({name: (rows + n / 4).contiguous() for n, name in enumerate("abc")}, tmp_path / "x.safetensors")
    return {ref.name: ref for ref in read_header(tmp_path / "x.safetensors").tensors}


@pytest.fixture
def sizes(monkeypatch):
    """Return the bytes of each read so far."""
    found, at = [], contents.content_at

    def noted(source, start, nbytes):
        found.append(nbytes)
        return at(source, start, nbytes)

    monkeypatch.setattr(contents, "content_at", noted)
    return found


def test_threads_that_read_at_once_get_their_own_rows(refs):
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)

        def is_right(seed):
            drawn = random.Random(seed)
            for _ in range(200):
                n, name = drawn.choice(list(enumerate("abc")))
                rows = drawn.sample(range(N_ROWS), 5)
                found = reader.tensor(refs[name], rows)
                if found.tolist() != [[row + n / 4] * 16 for row in rows]:
                    return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(is_right, range(8)))


def test_whole_tensors_that_are_small_together_are_read_once(refs, sizes):
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)
        for _ in range(3):
            for ref in refs.values():
                reader.tensor(ref)
    assert sizes == [N_ROWS * 16 * 4] * 3


def test_of_whole_tensors_that_are_too_large_together_the_last_are_kept(refs, sizes, monkeypatch):
    monkeypatch.setattr(reading, "_KEPT_BYTES", 2 * N_ROWS * 16 * 8)
    a, b, c = refs.values()
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)
        for ref in (a, b, a, c, a, c, b, b):
            reader.tensor(ref)
    assert len(sizes) == 4  # a, b, then c in the place of b, and b again


def test_a_tensor_larger_than_all_that_is_kept_is_kept_while_it_is_the_last(refs, sizes, monkeypatch):
    monkeypatch.setattr(reading, "_KEPT_BYTES", 1)
    a, b, _ = refs.values()
    with contextlib.ExitStack() as stack:
        reader = Reader(stack)
        for ref in (a, a, b, b, a):
            reader.tensor(ref)
    assert len(sizes) == 3
