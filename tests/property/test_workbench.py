"""Buffers are reused and never mixed up: whatever the tiles, their order and how many are under way, bytes are the same."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import lora_merge
from lora_merge.codecs import CODECS
from lora_merge.core.tensor import DTYPE_BITS
from lora_merge.core.weight import DENSE, WEIGHT, Storage, Tile
from lora_merge.merging.worker.workbench import Parts, Workbench
from tests.filling import fill


def parts(rows, columns, dtype):
    """Return a tile of a plain tensor, as it is stored."""
    storage = Storage(DENSE, dtype)
    return Parts(storage, CODECS[DENSE].ranges(Tile((rows, columns), rows, 0, rows), storage))


def frame_of(bench, rows, columns, stored, written):
    """Return a frame for a tile of a plain tensor."""
    return bench.frame(rows, columns, parts(rows, columns, stored), parts(rows, columns, written))


CODES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
tiles = st.tuples(
    st.integers(1, 9), st.integers(1, 9), st.sampled_from(list(CODES)), st.sampled_from(list(CODES))
)


@given(st.lists(tiles, min_size=1, max_size=12), st.integers(1, 3))
def test_a_frame_has_the_shape_and_dtypes_that_were_asked_for_and_bytes_to_match(drawn, depth):
    bench = Workbench("cpu", depth)
    for rows, columns, stored, written in drawn:
        frame = frame_of(bench, rows, columns, stored, written)
        assert frame.values.shape == frame.rounded[WEIGHT].shape == (rows, columns)
        assert (frame.values.dtype, frame.rounded[WEIGHT].dtype) == (torch.float32, CODES[written])
        assert len(frame.raw[WEIGHT]) == rows * columns * DTYPE_BITS[stored] // 8
        assert len(frame.encoded[WEIGHT]) == rows * columns * DTYPE_BITS[written] // 8


def test_frames_that_are_under_way_together_share_no_memory():
    bench = Workbench("cpu", 3)
    frames = [frame_of(bench, 4, 8, "BF16", "F16") for _ in range(3)]
    for n, frame in enumerate(frames):
        frame.values.fill_(n)
        frame.rounded[WEIGHT].fill_(n)
    assert [frame.values.unique().tolist() for frame in frames] == [[0], [1], [2]]
    assert [frame.rounded[WEIGHT].unique().tolist() for frame in frames] == [[0], [1], [2]]


def test_a_shape_that_comes_again_finds_its_views_and_a_larger_one_makes_all_anew():
    bench = Workbench("cpu")
    small = frame_of(bench, 4, 8, "BF16", "BF16")
    assert frame_of(bench, 2, 8, "BF16", "BF16") is not small
    assert frame_of(bench, 4, 8, "BF16", "BF16") is small
    frame_of(bench, 40, 80, "BF16", "BF16")
    again = frame_of(bench, 4, 8, "BF16", "BF16")
    assert again is not small
    assert again.values.data_ptr() != small.values.data_ptr()


def test_values_that_are_not_finite_are_seen_and_sums_that_overflow_alone_are_not_mistaken():
    for written, dtype in CODES.items():
        frame = frame_of(Workbench("cpu"), 300, 300, "F32", written)
        largest = torch.finfo(dtype).max
        for value, finite in ((1.0, True), (largest, True), (float("inf"), False), (float("nan"), False)):
            frame.values.fill_(1.0 if finite is False else value)
            frame.values[7, 5] = value
            frame.encode(CODECS[DENSE], Tile((300, 300), 300, 0, 300))
            assert frame.is_finite() is finite, (written, value)


shapes = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30), st.sampled_from(list(CODES.values()))), min_size=1, max_size=5)  # fmt: skip


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@settings(max_examples=8, deadline=None)
@given(shapes)
def test_tiles_under_way_together_leave_the_bytes_of_one_at_a_time(dtype, drawn):
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        root = Path(name)
        base, adapter = {}, {}
        for n, (n_out, n_in, kind) in enumerate(drawn):
            base[f"m{n}.proj.weight"] = torch.randn(n_out, n_in, generator=generator).to(kind)
            module = f"base_model.model.m{n}.proj"
            adapter[f"{module}.lora_A.weight"] = torch.randn(2, n_in, generator=generator)
            adapter[f"{module}.lora_B.weight"] = torch.randn(n_out, 2, generator=generator)
            adapter[f"{module}.lora_magnitude_vector"] = torch.rand(n_out, generator=generator) + 1
        for directory, file, tensors in (
            ("base", "model.safetensors", base),
            ("adapter", "adapter_model.safetensors", adapter),
        ):
            (root / directory).mkdir()
            save_file(tensors, root / directory / file, {"format": "pt"})
        (root / "base" / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["proj"], "use_dora": True}
        (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        plan = lora_merge.plan(base=root / "base", adapter=root / "adapter", dtype=dtype)
        written = []
        for depth in (1, 3):
            patch.setattr(Workbench, "of", classmethod(lambda cls, device, depth=depth: cls(device, depth)))
            out = root / f"out-{depth}"
            records = fill(plan, out, "threads", 2, tile_elements=1 << 10)
            written.append((records, (out / "model.safetensors").read_bytes()))
    assert written[0] == written[1]
    assert len(written[0][0]) == len(drawn)
