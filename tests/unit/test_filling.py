"""Steps become pieces in the order of the files that they fill, and files are known to be full at once."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

import lora_merge
from lora_merge.core.tensor import TensorRecord
from lora_merge.merging import filling

N_LAYERS = 4


@pytest.fixture
def plan(tmp_path):
    """A plan of four files, each with a large and a small tensor that are merged and two that are copied."""
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    sizes = {"small": (8, 16), "large": (64, 16)}
    factors = {}
    weight_map = {}
    for n in range(N_LAYERS):
        tensors = {f"layers.{n}.{name}.weight": torch.randn(shape) for name, shape in sizes.items()}
        tensors |= {f"layers.{n}.{name}.bias": torch.randn(shape[0]) for name, shape in sizes.items()}
        file = f"model-{n + 1:05}-of-{N_LAYERS:05}.safetensors"
        save_file(tensors, tmp_path / "base" / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        for name, (rows, columns) in sizes.items():
            key = f"base_model.model.layers.{n}.{name}"
            factors |= {
                f"{key}.lora_A.weight": torch.randn(2, columns),
                f"{key}.lora_B.weight": torch.randn(rows, 2),
            }
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["small", "large"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return lora_merge.plan(base=tmp_path / "base", adapter=tmp_path / "adapter")


def files_of(pieces):
    return [step.slots[0].file for piece in pieces for _, steps in piece.wanted for step in steps]


def records_of(pieces):
    return [
        TensorRecord(slot.name, slot.file, slot.nbytes, "digest", finite=True)
        for piece in pieces
        for _, steps in piece.wanted
        for step in steps
        for slot in step.slots
    ]


def test_files_come_one_after_the_other_and_the_large_tensors_of_each_first(plan):
    left, order = [(0, step) for step in plan.steps][::-1], filling.Order([plan])
    names = [file.name for file in plan.files]

    merges = filling.merges(left, order)
    assert files_of(merges) == [name for name in names for _ in range(2)]
    assert [piece.nbytes for piece in merges] == [4096, 512] * N_LAYERS
    assert list(dict.fromkeys(files_of(filling.copies(left[::-1], order)))) == names


def test_outputs_that_want_the_same_have_it_in_one_piece(plan):
    alone = [(0, step) for step in plan.steps]
    both = [*alone, *((1, step) for step in plan.steps)]
    one, two = filling.Order([plan]), filling.Order([plan, plan])

    for make in (filling.copies, filling.merges):
        pieces = make(both, two)
        assert len(pieces) == len(make(alone, one))
        assert {tuple(number for number, _ in piece.wanted) for piece in pieces} == {(0, 1)}
        assert sum(piece.nbytes for piece in pieces) == 2 * sum(piece.nbytes for piece in make(alone, one))
        assert pickle.loads(pickle.dumps(pieces)) == pieces


def test_a_file_is_full_with_its_last_tensor_and_not_before(plan):
    left, order = [(0, step) for step in plan.steps], filling.Order([plan])
    records = records_of([*filling.copies(left, order), *filling.merges(left, order)])
    unfinished, full = filling.Unfinished(plan, []), []
    assert unfinished.full == ()
    for record in records:
        found = unfinished.without([record])
        assert len(found) <= 1
        full += found
    assert full == [file.name for file in plan.files]
    assert unfinished.without([]) == []


def test_files_that_are_there_from_an_interrupted_run_or_hold_nothing_are_full_at_once(plan):
    first, *others = plan.files
    empty = dataclasses.replace(first, name="empty.safetensors", slots=())
    done = [
        TensorRecord(slot.name, slot.file, slot.nbytes, "digest", finite=True)
        for file in others
        for slot in file.slots
    ]
    unfinished = filling.Unfinished(dataclasses.replace(plan, files=(*plan.files, empty)), done)
    assert sorted(unfinished.full) == sorted([empty.name, *(file.name for file in others)])
