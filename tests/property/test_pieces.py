"""Whatever is done to assemblies is what torch does to tensors: every piece is where it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge.modeling.pieces import Assembly, UnknownOperationError


def filled(assembly, parts):
    """Return the tensor that an assembly stands for."""
    whole = torch.full(assembly.shape, -1)
    for piece in assembly.pieces:
        box = piece.part_box(piece.box())
        content = parts[piece.part][tuple(slice(*limits) for limits in box)].permute(piece.part_axes())
        place = tuple(
            slice(span.start, span.end) if span.axis is not None else span.start for span in piece.spans
        )
        whole[place] = content
    return whole


@st.composite
def histories(draw):
    """Return parts, and the same made of them twice: as an assembly and as a tensor."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    parts, pool = {}, []
    for n in range(draw(st.integers(2, 4))):
        size = torch.Size(shape).numel()
        parts[f"p{n}"] = torch.arange(n * 100, n * 100 + size).view(shape)
        pool.append((Assembly.whole(f"p{n}", shape), parts[f"p{n}"]))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["stack", "cat", "chunk", "split", "transpose"]))
        one, real = pool[0]
        dim = draw(st.integers(0, one.ndim - 1))
        alike = [pair for pair in pool if pair[0].shape == one.shape]
        if kind in {"stack", "cat"}:
            join = torch.stack if kind == "stack" and one.ndim < 4 else torch.cat
            made = [(join([a for a, _ in alike], dim=dim), join([t for _, t in alike], dim=dim))]
        elif kind == "transpose":
            other = draw(st.integers(0, one.ndim - 1))
            made = [(torch.transpose(a, dim, other), torch.transpose(t, dim, other)) for a, t in alike]
        elif kind == "chunk":
            n = draw(st.integers(1, 3))
            made = list(zip(torch.chunk(one, n, dim=dim), torch.chunk(real, n, dim=dim), strict=True))
        else:
            first = draw(st.integers(1, one.shape[dim]))
            sizes = [size for size in (first, one.shape[dim] - first) if size]
            made = list(zip(torch.split(one, sizes, dim), torch.split(real, sizes, dim), strict=True))
        pool = made + [pair for pair in pool if pair[0].shape != one.shape]
    return parts, pool


@settings(max_examples=300, deadline=None)
@given(histories())
def test_an_assembly_is_where_torch_puts_its_parts(history):
    parts, pool = history
    for assembly, real in pool:
        assert assembly.shape == tuple(real.shape)
        assert torch.equal(filled(assembly, parts), real)


@settings(max_examples=200, deadline=None)
@given(histories(), st.data())
def test_a_box_of_the_whole_is_the_box_of_the_part_that_holds_it(history, data):
    parts, pool = history
    assembly, real = pool[0]
    box = []
    for size in assembly.shape:
        start = data.draw(st.integers(0, size))
        box.append((start, data.draw(st.integers(start, size))))
    wanted = set(real[tuple(slice(*limits) for limits in box)].flatten().tolist())
    found = [
        value
        for piece in assembly.pieces
        if (inner := piece.part_box(tuple(box))) is not None
        for value in parts[piece.part][tuple(slice(*limits) for limits in inner)].flatten().tolist()
    ]
    assert len(found) == len(set(found))
    assert set(found) == wanted


@pytest.mark.parametrize(
    "work", [lambda a: a.reshape(6), lambda a: a.view(3, 2), torch.flip, lambda a: a.roll(1)]
)
def test_what_reorders_elements_is_unknown(work):
    assembly = Assembly.whole("p", (2, 3))
    with pytest.raises(UnknownOperationError):
        work(assembly, [0]) if work is torch.flip else work(assembly)
