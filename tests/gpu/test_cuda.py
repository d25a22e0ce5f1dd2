"""The arithmetic on a CUDA device: the CPU's values, up to one rounding.

The suite hides CUDA devices from itself; ``CUDA_VISIBLE_DEVICES=0 pytest tests/gpu`` shows it one.
"""

from __future__ import annotations

import pytest
import torch

import lora_merge
from lora_merge.core.plan import Merge
from tests.parity import building
from tests.parity.kinds import KINDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="torch sees no CUDA device; with one, run: CUDA_VISIBLE_DEVICES=0 pytest tests/gpu",
    ),
]

ROUNDOFF = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
SMALLEST = {"BF16": 2.0**-133, "F16": 2.0**-24, "F32": 2.0**-149}


def tensors_of(root):
    from safetensors.torch import load_file

    return {name: tensor for path in root.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bound(step, stored):
    """Return how far two merges of a tensor may be apart.

    With u the unit roundoff of the stored dtype and v = 2⁻²⁴, each is off from x = w + s·Σ bᵢaᵢ by at most
    (1 + u)·(r + 4)·v·(|w| + |s|·Σ|bᵢaᵢ|) before it is stored. Two such numbers, twice that apart, are then
    rounded once each: by u·|x| at most, or half a subnormal.
    """
    from safetensors import safe_open

    def factor(ref):
        with safe_open(ref.file, "pt") as file:
            return file.get_tensor(ref.name).double().abs()

    slot, weight = step.main, step.op.source.plain
    magnitude, rank = factor(weight), 0
    for delta in step.op.deltas:
        product = factor(delta.factors["B"]) @ factor(delta.factors["A"])
        magnitude += abs(delta.scale) * (product.T if delta.region.transposed else product)
        rank += delta.rank
    carried = (1 + ROUNDOFF[slot.dtype]) * (rank + 4) * 2.0**-24 * magnitude
    return 2 * carried + 2 * ROUNDOFF[slot.dtype] * (stored.abs() + carried) + SMALLEST[slot.dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "gpt2"])
def test_a_merge_on_cuda_is_within_one_rounding_of_the_cpus(family, dtype, pico, pico_adapter, tmp_path):
    base = pico(family, dtype)
    adapter = pico_adapter(base, target_modules="all-linear")
    for device in ("cpu", "cuda"):
        report = lora_merge.merge(
            base=base, adapter=adapter, out=tmp_path / device, device=device, verify="full"
        )
        assert report.verdict.ok
    on_cpu, on_cuda = tensors_of(tmp_path / "cpu"), tensors_of(tmp_path / "cuda")
    assert sorted(on_cpu) == sorted(on_cuda)
    n_merged = 0
    for step in lora_merge.plan(base=base, adapter=adapter).steps:
        name = step.name
        if isinstance(step.op, Merge):
            wanted = on_cpu[name].double()
            assert ((on_cuda[name].double() - wanted).abs() <= bound(step, wanted)).all(), name
            n_merged += 1
        else:
            assert torch.equal(on_cuda[name], on_cpu[name]), name
    assert n_merged >= 8


KINDS_ON_CUDA = {
    "LoRA on an embedding": "llama",
    "DoRA on a linear layer": "llama",
    "DoRA on Conv1D": "gpt2",
    "LoRA on Conv2d": "resnet",
    "AdaLoRA": "llama",
    "BD-LoRA": "llama",
    "LoRA on stacked experts (target_parameters), two parameters": "gpt_oss",
    "LoRA with a bias (lora_bias)": "llama_biased",
    "trainable_token_indices": "llama",
    "LoHa": "llama",
}


def built(workshop, name, model, dtype="bfloat16"):
    kind = next(kind for kind in KINDS if kind.name == name)
    return building.case(workshop, kind, model, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "model"), KINDS_ON_CUDA.items(), ids=KINDS_ON_CUDA)
def test_every_value_of_a_merge_on_cuda_is_that_of_its_formula(name, model, dtype, workshop, tmp_path):
    case = built(workshop, name, model, dtype)
    report = lora_merge.merge(
        base=case.base, adapter=case.adapter, out=tmp_path / "out", device="cuda", verify="full"
    )
    assert report.verdict.ok
    assert report.summary.n_merged > 0


@pytest.mark.parametrize("combine", ["ties", "dare_linear", "dare_ties", "svd"])
def test_adapters_are_combined_on_cuda_the_same_way_twice(combine, workshop, tmp_path):
    cases = [built(workshop, name, "llama") for name in ("LoRA", "DoRA on a linear layer")]
    torch.cuda.manual_seed(5)
    wanted = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(5)
    for name in ("one", "again"):
        report = lora_merge.merge(
            base=cases[0].base, adapter=[case.adapter for case in cases], out=tmp_path / name, device="cuda",
            combine=combine, verify="full", workers=4,
        )  # fmt: skip
        assert report.verdict.ok
    one, other = (tmp_path / name / "model.safetensors" for name in ("one", "again"))
    assert one.read_bytes() == other.read_bytes()
    assert torch.equal(torch.rand(3, device="cuda"), wanted)  # torch's own random numbers are not disturbed


@pytest.mark.parametrize("fields", [{}, {"quantize": "fp8"}, {"quantize": "int4"}], ids=str)
def test_rounding_keeps_the_adapter_on_cuda(fields, pico, pico_adapter, tmp_path):
    base = pico()
    report = lora_merge.merge(
        base=base, adapter=pico_adapter(base, target_modules="all-linear"), out=tmp_path / "out",
        device="cuda", rounding="adapter", allow_loss=True, verify="full", **fields,
    )  # fmt: skip
    assert report.verdict.ok
    effects = [one for one in report.survival.values() if one.effect_norm > 0]
    assert effects
    assert all(one.effect_error < one.effect_norm for one in effects)


@pytest.mark.parametrize("workers", [2, 4])
def test_cuda_writes_the_same_bytes_whatever_the_number_of_workers(workers, pico, pico_adapter, tmp_path):
    base = pico()
    adapter = pico_adapter(base, target_modules="all-linear")
    for n_workers in (1, workers):
        lora_merge.merge(
            base=base, adapter=adapter, out=tmp_path / str(n_workers) / "out", device="cuda",
            workers=n_workers,
        )  # fmt: skip
    one, other = (tmp_path / str(n) / "out" / "model.safetensors" for n in (1, workers))
    assert one.read_bytes() == other.read_bytes()


def test_a_cuda_device_that_is_not_there_is_refused(pico, pico_adapter, tmp_path):
    with pytest.raises(lora_merge.RequestError, match="cuda:99"):
        lora_merge.merge(base=pico(), adapter=pico_adapter(pico()), out=tmp_path / "out", device="cuda:99")
