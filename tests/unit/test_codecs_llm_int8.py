"""LLM.int8 against its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.decoding import decoded, is_same_in_tiles, same, storage_of

STORAGE = storage_of("llm_int8", "I8")


def drawn(shape):
    random = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randint(-128, 128, shape, generator=random, dtype=torch.int8),
        "scale": torch.rand(shape[:-1], generator=random),
    }


@pytest.mark.parametrize("shape", [(1, 1), (96, 40), (700, 3)], ids=str)
def test_each_value_is_code_times_scale_times_one_127th(shape):
    stored = drawn(shape)
    product = stored["weight"].numpy().astype(np.float32) * stored["scale"].numpy()[:, None]
    wanted = product * np.float32(7.874015718698502e-3)
    assert wanted.dtype == np.float32
    assert same(decoded(shape, STORAGE, stored), torch.from_numpy(wanted))
    assert is_same_in_tiles(shape, STORAGE, stored)


def test_the_largest_code_gives_back_the_scale():
    stored = {"weight": torch.tensor([[127, -127, 0]], dtype=torch.int8), "scale": torch.tensor([2.0])}
    assert decoded((1, 3), STORAGE, stored).tolist() == [[2.0, -2.0, 0.0]]


def test_a_scale_that_is_nan_makes_its_row_nan():
    stored = drawn((4, 5))
    stored["scale"][2] = torch.nan
    assert decoded((4, 5), STORAGE, stored).isnan().sum(1).tolist() == [0, 0, 5, 0]
