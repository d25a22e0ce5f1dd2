"""NaN and infinity are found by their bits: the answer is that of torch, for every dtype that numbers are stored in."""

from __future__ import annotations

import pytest
import torch

from lora_merge.core.tensor import STORED_TYPES, TensorRef
from lora_merge.formats.safetensors import is_finite

FLOATS = {code: getattr(torch, name) for code, name in STORED_TYPES.items() if "F" in code}


def ref_of(path, values):
    raw = values.contiguous().view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw)
    code = next(code for code, dtype in FLOATS.items() if dtype == values.dtype)
    return TensorRef("w", code, tuple(values.shape), str(path), 0, len(raw))


@pytest.mark.parametrize("code", [code for code, dtype in FLOATS.items() if dtype.itemsize <= 2])
def test_each_number_of_a_small_dtype_is_judged_as_torch_does(tmp_path, code):
    dtype = FLOATS[code]
    width = 8 * dtype.itemsize
    every = (
        torch.arange(1 << width, dtype=torch.int64).to(torch.uint8 if width == 8 else torch.int16).view(dtype)
    )
    wanted = every.float().isfinite()
    ref = ref_of(tmp_path / "every", every)
    size = ref.nbytes // len(every)
    found = [
        is_finite(TensorRef("w", code, (1,), ref.file, n * size, size))
        for n in range(0, len(every), 1 if size == 1 else 61)
    ]
    assert found == wanted[:: 1 if size == 1 else 61].tolist()
    assert not all(found)
    finite = every[wanted]
    assert is_finite(ref_of(tmp_path / "finite", finite))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("code", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("at", [0, 131_071, 131_072, 3_000_000, -1])
def test_one_odd_number_is_found_wherever_it_is(tmp_path, code, odd, at):
    values = torch.zeros(3_000_001, dtype=FLOATS[code])
    # The largest finite numbers of both signs are no fault.
    values[1::2], values[::2] = torch.finfo(FLOATS[code]).max, torch.finfo(FLOATS[code]).min
    assert is_finite(ref_of(tmp_path / "w", values))
    values[at] = odd
    assert not is_finite(ref_of(tmp_path / "w", values))


def test_no_number_is_finite(tmp_path):
    assert is_finite(ref_of(tmp_path / "w", torch.empty(0, 4)))


def test_bytes_that_are_scales_are_judged_as_such(tmp_path):
    ref = ref_of(tmp_path / "w", torch.tensor([1.0, 2.0**100]).to(torch.float8_e8m0fnu))
    as_bytes = TensorRef("w", "U8", ref.shape, ref.file, 0, ref.nbytes)
    assert is_finite(as_bytes, "F8_E8M0")
    (tmp_path / "w").write_bytes(b"\x7f\xff")
    assert not is_finite(as_bytes, "F8_E8M0")
    assert not is_finite(as_bytes, "F8_E4M3")
