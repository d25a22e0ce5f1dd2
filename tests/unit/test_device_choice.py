"""``--device auto``: a GPU is taken where measured costs say that it pays, and a sentence says why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lora_merge.core.adapter import Delta
from lora_merge.core.checkpoint import ConfigPatch
from lora_merge.core.plan import Combination, MergePlan, Rounding
from lora_merge.core.tensor import TensorRef
from lora_merge.core.view import View
from lora_merge.deltas import LowRankFacts
from lora_merge.merging import device_choice
from lora_merge.merging.device_choice import Gpu, choose, needed_bytes
from lora_merge.runtime import machine
from tests.steps import dense_merge, step_at

H200 = Gpu("NVIDIA H200", 140 << 30)


def plan_of(n_weights=15, size=4096, method="", rounding=None):
    """Return the plan of a LoRA on some square weights, or of two combined by a method."""
    steps = []
    for n in range(n_weights):
        ref = TensorRef(f"w{n}", "BF16", (size, size), "base", n * 2 * size * size, 2 * size * size)
        factors = {"A": TensorRef("a", "F32", (16, size), "adapter", 0, 64 * size)}
        delta = Delta(f"w{n}", LowRankFacts(), factors).placed(f"w{n}")
        op = dense_merge(ref, (delta,) * (2 if method else 1), View.of(ref.shape))
        combination = Combination(method, 0.5, 0, 16, f"w{n}") if method else None
        steps.append(step_at(ref, replace(op, combination=combination, rounding=rounding)))
    return MergePlan("base", (), (), (), tuple(steps), (), ConfigPatch(), "", ())


def test_a_lora_is_merged_on_the_cpu_however_large():
    for n_cores in (1, 2, 8, 64):
        found = choose(plan_of(400), max(n_cores, 4), H200)
        assert found.device == "cpu"
        assert found.why.startswith("the merge takes about")
        assert "NVIDIA H200" in found.why


def test_measured_gains_are_taken():
    """Two adapters into 0.5 GB with eight cores: 13.0 s against 7.6 s for TIES, 10.9 s against 2.7 s for an SVD."""
    for method in ("ties", "svd"):
        found = choose(plan_of(method=method), 8, H200)
        assert found.device == "cuda:0", found.why
        assert "on 8 cores and" in found.why


def test_cores_enough_outweigh_a_gpu():
    assert choose(plan_of(method="ties"), 8, H200).device == "cuda:0"
    assert choose(plan_of(method="ties"), 32, H200).device == "cpu"


def test_its_set_up_outweighs_a_small_merge():
    assert choose(plan_of(1, 256, "ties"), 2, H200).device == "cpu"


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_what_was_not_measured_gains_nothing(method):
    assert choose(plan_of(method=method), 2, H200).device == "cpu"
    assert choose(plan_of(rounding=Rounding("adapter", 0, "w")), 2, H200).device == "cpu"


def test_without_a_gpu_or_with_a_small_one_it_is_the_cpu():
    plan = plan_of(method="svd")
    assert choose(plan, 8, None).why == "torch finds no CUDA device here"
    needed = needed_bytes(plan)
    assert choose(plan, 8, replace(H200, memory_bytes=needed)).device == "cuda:0"
    small = choose(plan, 8, replace(H200, memory_bytes=needed - 1))
    assert (small.device, small.why) == ("cpu", "NVIDIA H200 has too little memory for the largest weight")


def test_a_dry_run_says_the_device_and_why(cli, pico, pico_adapter, monkeypatch, tmp_path):
    base = pico()
    arguments = (
        "--base",
        base,
        "--adapter",
        pico_adapter(base),
        "--out",
        tmp_path / "out",
        "--dry-run",
        "--json",
    )
    told = json.loads(cli(*arguments).stdout)["workers"]
    assert told["device"] == "cpu"
    assert "on a GPU" in told["device_why"]
    told = json.loads(cli(*arguments, "--device", "cpu").stdout)["workers"]
    assert told["device_why"] == "it was asked for"
    # A merge so heavy that a GPU would pay: only now is one looked for.
    monkeypatch.setattr(machine, "usable_cores", lambda: 1)
    monkeypatch.setattr(device_choice, "_SETUP_SECONDS", -1.0)
    told = json.loads(cli(*arguments).stdout)["workers"]
    assert (told["device"], told["device_why"]) == ("cpu", "torch finds no CUDA device here")
    told = json.loads(cli(*arguments, "--executor", "processes").stdout)["workers"]
    assert told["device_why"] == "--executor is processes"
