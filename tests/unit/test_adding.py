"""A product that compiled code adds to bfloat16 rows, against torch in float32."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from safetensors.torch import load_file

import lora_merge
from lora_merge.deltas.algebra import Product
from lora_merge.merging.worker.adding import _RANKS, add
from lora_merge.native import library as native
from lora_merge.native.library import hidden, library

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")


def drawn(rows, columns, rank, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    left, right = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    return base, left * size, right


def assert_as_torch(found, wanted):
    """Compare bfloat16 values. With AVX2 alone MKL sums some in another order: a step apart in one value of a million."""
    steps = (found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs()
    n_most = 0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2 + steps.numel() // 100_000
    assert int((steps > 0).sum()) <= n_most
    assert int(steps.max()) <= 1


def wanted(base, left, right, scale):
    values = base.float()
    values = values.addmm_(left, right) if scale == 1 else values.add_((left @ right).mul_(scale))
    return values.to(torch.bfloat16)


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="another matrix library may sum in another order"
)
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.37, -1.7])
@pytest.mark.parametrize("rank", [2, 3, 8, 16, 17, 32, 48, 64, 99, 128])
@pytest.mark.parametrize(("rows", "columns"), [(128, 1024), (100, 4096), (65, 14336), (257, 333)])
def test_the_bits_are_those_of_torch(rows, columns, rank, scale):
    base, left, right = drawn(rows, columns, rank)
    out = torch.empty_like(base)
    assert add(base, out, Product(left, right, scale))
    assert_as_torch(out, wanted(base, left, right, scale))


def test_rows_of_a_larger_factor_and_all_vectors():
    base, left, right = drawn(90, 700, 16)
    out, other = torch.empty_like(base[10:47]), torch.empty_like(base[10:47])
    assert add(base[10:47], out, Product(left[10:47], right, 1.0))
    found = library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_found", lambda: found._replace(lanes=min(found.lanes, 8)))
        assert add(base[10:47], other, Product(left[10:47], right, 1.0))
    assert torch.equal(out, other)
    # A sum in float64 is within a step of bfloat16.
    exact = base[10:47].double() + left[10:47].double() @ right.double()
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("what", [torch.nan, torch.inf, 3.39e38])
def test_what_is_not_finite_is_left_to_torch(what):
    base, left, right = drawn(70, 640, 8)
    base[69, 639] = what
    if what == 3.39e38:
        left[69], right[:, 639] = 1e19, 1e19
    assert not add(base, torch.empty_like(base), Product(left, right, 1.0))


@pytest.mark.parametrize("column", [0, 130, 639])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("step", "is_finite"), [(2.0**119 * (1 - 2**-14), True), (2.0**119, False)])
def test_the_largest_number_is_finite_and_half_a_step_more_is_not(step, is_finite, sign, column):
    base, left, right = drawn(70, 641, 8)
    base[66, column] = sign * torch.finfo(torch.bfloat16).max
    left[66], right[:, column] = 0, 0
    left[66, 3], right[3, column] = sign * step, 1
    right[3, :column], right[3, column + 1 :] = 0, 0
    out = torch.empty_like(base)
    assert add(base, out, Product(left, right, 1.0)) == is_finite
    assert bool(wanted(base, left, right, 1.0).isfinite().all()) == is_finite
    if is_finite:
        assert torch.equal(out, wanted(base, left, right, 1.0))


@pytest.mark.parametrize("rank", [1, _RANKS.stop])
def test_other_ranks_are_left_to_torch(rank):
    base, left, right = drawn(70, 640, rank)
    assert not add(base, torch.empty_like(base), Product(left, right, 1.0))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tensor of several tiles and an adapter for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("plain")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=8, vocab_size=256
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("alpha", [16, 11])
def test_a_merge_has_the_same_bytes_without_compiled_code(plain, alpha, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain / "base", dtype=torch.bfloat16)
    targets = ["q_proj", "up_proj", "down_proj"]
    peft = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=alpha, target_modules=targets, init_lora_weights=False)
    )
    peft.save_pretrained(tmp_path / "adapter")
    merge = {"base": str(plain / "base"), "adapter": str(tmp_path / "adapter"), "workers": 1}
    report = lora_merge.merge(out=str(tmp_path / "one"), **merge)
    with hidden():
        expected = lora_merge.merge(out=str(tmp_path / "other"), **merge)
    # One tile of each tensor is compared with what was wanted.
    assert len(report.survival) == 3
    assert report.survival.keys() == expected.survival.keys()
    for name, found in report.survival.items():
        assert astuple(found) == pytest.approx(astuple(expected.survival[name]), rel=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
