"""Norms of stored weights are those of float64, whatever the dtype and however large the values."""

import contextlib
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_merge.core.tensor import TensorRef
from lora_merge.formats.safetensors import box_norm, read_header
from lora_merge.native.library import hidden


def _ref(folder: Path, values: torch.Tensor) -> TensorRef:
    save_file({"w": values}, folder / "model.safetensors")
    (ref,) = read_header(folder / "model.safetensors").tensors
    return ref


def _is_near(found: float, values: torch.Tensor) -> bool:
    # Each addition of float64 may be off by 2**-53, and a dot product has few in a row.
    return math.isclose(found, float(values.double().norm()), rel_tol=1e-13)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_norm_is_that_of_float64(tmp_path: Path, dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    # More than a part that is squared at once, and more than a block that is read at once.
    values = torch.randn(1100, 1024).to(dtype)
    ref = _ref(tmp_path, values)

    with contextlib.nullcontext() if compiled else hidden():
        assert _is_near(box_norm(ref), values)
        assert _is_near(box_norm(ref, ((3, 700), (5, 1000))), values[3:700, 5:1000])


def test_squares_beyond_float32_have_a_norm(tmp_path: Path) -> None:
    values = torch.full((8, 8), 1e30)
    values[1] = 1e-30

    assert box_norm(_ref(tmp_path, values)) == pytest.approx(1e30 * math.sqrt(56), rel=1e-6)
    assert box_norm(_ref(tmp_path, values[1:2].contiguous())) == pytest.approx(1e-30 * math.sqrt(8), rel=1e-6)
