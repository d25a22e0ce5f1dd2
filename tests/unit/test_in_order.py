"""Bytes that come early wait until their place comes, in memory and in a file."""

from __future__ import annotations

import random

import pytest

from lora_merge.core.shards import header_bytes, place
from lora_merge.core.tensor import TensorRef
from lora_merge.errors import WriteError
from lora_merge.storage.in_order import InOrder

SIZES = {"a": 5, "b": 0, "c": 7, "d": 3, "e": 11}


class Keeping:
    """Takes bytes, and looks at them again only at the end, as a store may that sends them later."""

    def __init__(self):
        self.blocks = []

    def write(self, block):
        self.blocks.append(bytes(block))

    @property
    def content(self):
        return b"".join(self.blocks)


@pytest.fixture
def file():
    refs = [TensorRef(name, "U8", (size,), "", 0, size) for name, size in SIZES.items()]
    return place("model.safetensors", refs, {})


def content_of(slot):
    return bytes([ord(slot.name)]) * slot.nbytes


def whole(file):
    return header_bytes(file) + b"".join(map(content_of, file.slots))


@pytest.mark.parametrize("held_bytes", [0, 4, 1 << 20])
@pytest.mark.parametrize("seed", range(12))
def test_slots_that_are_filled_in_any_order_come_out_in_that_of_the_file(file, seed, held_bytes):
    draw, taker = random.Random(seed), Keeping()
    lines = InOrder((file,), {file.name: taker}, held_bytes)
    slots = draw.sample(file.slots, len(file.slots))
    # Two at a time, as a weight and its scales.
    for pair in (slots[:2], slots[2:]):
        writes = [(lines.open(slot), slot, []) for slot in pair]
        opened = [(context.__enter__(), memoryview(content_of(slot)), done) for context, slot, done in writes]
        while any(sum(done) < len(content) for _, content, done in opened):
            write, content, done = draw.choice([one for one in opened if sum(one[2]) < len(one[1])])
            buffer = bytearray(content[sum(done) : sum(done) + draw.randint(1, 4)])
            write(memoryview(buffer))
            done.append(len(buffer))
            buffer[:] = bytes(len(buffer))  # whoever writes may use its buffer again
        for context, _, _ in writes:
            context.__exit__(None, None, None)
    lines.finish()
    assert taker.content == whole(file)


def test_a_file_that_lacks_bytes_is_not_finished(file):
    taker = Keeping()
    lines = InOrder((file,), {file.name: taker})
    with lines.open(file.slots[0]) as write:
        write(memoryview(content_of(file.slots[0])))
    with pytest.raises(WriteError, match=rf"model.safetensors: has \d+ of {file.nbytes} bytes"):
        lines.finish()


def test_what_comes_next_never_waits(file):
    taker = Keeping()
    lines = InOrder((file,), {file.name: taker}, held_bytes=0)
    for n, slot in enumerate(file.slots):
        with lines.open(slot) as write:
            write(memoryview(content_of(slot)))
        assert len(taker.content) == file.slots[n].end


def test_bytes_that_the_storage_has_copied_are_passed_over(file):
    taker = Keeping()
    lines = InOrder((file,), {file.name: taker})
    first, *others = file.slots
    with lines.open(others[1]) as write:
        write(memoryview(content_of(others[1])))
    lines.skip(file.name, first.nbytes)
    for slot in others[2:]:
        with lines.open(slot) as write:
            write(memoryview(content_of(slot)))
    lines.finish()
    assert taker.content == whole(file).replace(content_of(first), b"")
