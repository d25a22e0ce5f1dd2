"""Every byte of an output has one place: no tensor twice, no hole, no overlap, and others read it so."""

from __future__ import annotations

import json
import math
import os
import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from lora_merge.core.plan import Combination
from lora_merge.core.shards import header_bytes, index_text, place, split
from lora_merge.core.tensor import DTYPE_BITS, TensorRef, nbytes_of
from lora_merge.core.view import MIN_TILE_ROWS, PANEL_ELEMENTS, TILE_ELEMENTS, View
from lora_merge.formats.safetensors import read_header
from tests.steps import dense_merge

WHOLE_BYTES = sorted(code for code, bits in DTYPE_BITS.items() if bits % 8 == 0)

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
refs = st.builds(
    lambda name, dtype, shape: TensorRef(name, dtype, shape, "elsewhere", 12345, nbytes_of(dtype, shape)),
    names,
    st.sampled_from(WHOLE_BYTES),
    shapes,
)
tensor_lists = st.lists(refs, max_size=12, unique_by=lambda ref: ref.name)
metadata = st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=3)


@settings(max_examples=150, deadline=None)
@given(tensor_lists, metadata)
def test_places_follow_each_other_from_the_header_to_the_end(tensors, extra):
    file = place("model.safetensors", tensors, extra)
    bounds = [len(header_bytes(file)), *(slot.end for slot in file.slots)]
    assert [slot.start for slot in file.slots] == bounds[:-1]
    assert bounds[-1] == file.nbytes
    assert bounds[0] % 8 == 0
    assert [(slot.name, slot.dtype, slot.shape) for slot in file.slots] == [
        (ref.name, ref.dtype, ref.shape) for ref in tensors
    ]
    assert all(slot.nbytes == nbytes_of(slot.dtype, slot.shape) for slot in file.slots)


@settings(max_examples=150, deadline=None)
@given(tensor_lists, metadata)
def test_a_file_with_our_header_is_read_alike_by_the_safetensors_library_and_by_us(tensors, extra):
    file = place("model.safetensors", tensors, extra)
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / file.name
        head = header_bytes(file)
        path.write_bytes(head + os.urandom(file.nbytes - len(head)))
        with safe_open(path, "np") as library:
            seen = {}
            for name in library.keys():  # noqa: SIM118 - the library's object is no mapping
                part = library.get_slice(name)
                seen[name] = (part.get_dtype(), tuple(part.get_shape()))
            assert library.metadata() == {"format": "pt", **extra}
        ours = read_header(path, file.name)
    assert seen == {ref.name: (ref.dtype, ref.shape) for ref in tensors}
    places = {slot.name: (slot.dtype, slot.shape, slot.start, slot.nbytes) for slot in file.slots}
    assert {ref.name: (ref.dtype, ref.shape, ref.start, ref.nbytes) for ref in ours.tensors} == places


@settings(max_examples=300, deadline=None)
@given(tensor_lists, st.integers(1, 600))
def test_shards_hold_every_tensor_once_in_order_and_no_more_than_the_limit(tensors, limit):
    shards = split(tensors, limit)
    assert [ref for _, shard in shards for ref in shard] == tensors
    sizes = [[nbytes_of(ref.dtype, ref.shape) for ref in shard] for _, shard in shards]
    assert all(shard for _, shard in shards)
    assert all(sum(shard) <= limit or len([size for size in shard if size]) == 1 for shard in sizes)
    assert all(sum(shard) + following[0] > limit for shard, following in pairwise(sizes))
    file_names = [name for name, _ in shards]
    assert len(set(file_names)) == len(file_names)
    assert file_names == sorted(file_names)


@settings(max_examples=150, deadline=None)
@given(tensor_lists.filter(len), st.integers(1, 600), metadata)
def test_the_index_names_the_file_of_every_tensor_and_counts_their_bytes(tensors, limit, extra):
    files = [place(name, shard, {}) for name, shard in split(tensors, limit)]
    index = json.loads(index_text(files, {**extra, "total_size": 1}))
    assert index["metadata"] == {**extra, "total_size": sum(ref.nbytes for ref in tensors)}
    assert sorted(index["weight_map"]) == sorted(ref.name for ref in tensors)
    for file in files:
        assert all(index["weight_map"][slot.name] == file.name for slot in file.slots)


sizes = st.integers(0, 1 << 22)
stored_shapes = st.one_of(
    st.tuples(),
    st.tuples(sizes),
    st.tuples(sizes, sizes),
    st.tuples(sizes, st.integers(1, 4096), *[st.integers(1, 7)] * 2),
    st.tuples(st.integers(1, 300), st.integers(1, 20_000), st.integers(1, 20_000)),
)
views = st.builds(lambda shape, stacked: View.of(shape, stacked=stacked), stored_shapes, st.booleans())


def is_cover(ranges, n):
    """Return True when ranges follow each other from 0 to n."""
    bounds = [0, *(end for _, end in ranges)]
    return bounds[-1] == n and [start for start, _ in ranges] == bounds[:-1]


@given(stored_shapes, st.booleans())
def test_a_view_has_every_element_of_the_tensor(shape, stacked):
    view = View.of(shape, stacked=stacked)
    assert view.n_rows * view.columns == math.prod(shape)
    assert view.n_rows == view.blocks * view.rows
    if stacked and len(shape) == 3:
        assert (view.blocks, view.rows, view.columns) == shape
    elif shape:
        assert (view.blocks, view.rows) == (1, shape[0])


@settings(max_examples=300, deadline=None)
@given(views.filter(lambda view: view.n_rows < 1 << 20))
def test_tiles_cover_every_row_once_and_are_never_a_handful_of_rows(view):
    tiles = view.tiles()
    assert is_cover(tiles, view.n_rows)
    by_size = [end - start for start, end in tiles]
    assert all(n_rows > 0 for n_rows in by_size) or view.n_rows == 0
    wanted = max(MIN_TILE_ROWS, TILE_ELEMENTS // max(view.columns, 1))
    assert all(n_rows < 2 * wanted for n_rows in by_size)
    for start, end in tiles:
        first, last = start // max(view.rows, 1), (end - 1) // max(view.rows, 1)
        if first == last:
            assert end - start >= min(MIN_TILE_ROWS, view.rows)
        else:  # several blocks, each of them whole
            assert start % view.rows == 0
            assert end % view.rows == 0
    parts = [end - start for start, end in tiles if end - start < view.rows]
    assert not parts or max(parts) - min(parts) <= 1


@settings(max_examples=300, deadline=None)
@given(views.filter(lambda view: view.columns < 1 << 20))
def test_panels_cover_every_column_once_and_are_no_larger_than_they_may_be(view):
    panels = view.panels()
    assert is_cover(panels, view.columns)
    assert all((right - left) * view.n_rows <= PANEL_ELEMENTS or right - left == 1 for left, right in panels)


@given(views, st.sampled_from(["rows", "columns", "tensor"]))
def test_what_reaches_across_the_tensor_is_worked_on_at_once(view, reach):
    slot = TensorRef("w", "F32", (view.n_rows, view.columns), "file", 0, 0)
    how = Combination("ties", 0.5, 0, 4, "name") if reach == "tensor" else None
    tiles = dense_merge(slot, (), view, reach, how).tiles()
    assert tiles == ([(0, view.n_rows)] if reach == "tensor" else view.tiles())
