"""The number of workers changes nothing: outputs are the same directories, byte by byte."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.core.plan import Merge
from tests.filling import fill
from tests.parity import building
from tests.parity.kinds import KINDS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

matrices = st.tuples(st.integers(1, 200), st.integers(1, 40), st.sampled_from(DTYPES))
modules = st.lists(st.tuples(matrices, st.none() | st.integers(1, 9)), min_size=1, max_size=6)


def write_inputs(root, drawn):
    """Write a base of plain matrices, each with a bias and a counter, and an adapter for some of them."""
    generator = torch.Generator().manual_seed(len(drawn))
    base, adapter, ranks = {}, {}, {}
    for n, ((n_out, n_in, dtype), rank) in enumerate(drawn):
        module = f"layers.{n}.proj"
        base[f"{module}.weight"] = torch.randn(n_out, n_in, generator=generator).to(dtype)
        base[f"{module}.bias"] = torch.randn(n_out, generator=generator)
        base[f"layers.{n}.seen"] = torch.tensor(n)
        if rank:
            ranks[module] = rank
            adapter[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
            adapter[f"base_model.model.{module}.lora_B.weight"] = torch.randn(
                n_out, rank, generator=generator
            )
    (root / "base").mkdir()
    (root / "adapter").mkdir()
    save_file(base, root / "base" / "model.safetensors", {"format": "pt"})
    (root / "base" / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    save_file(adapter, root / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 5,
        "target_modules": list(ranks),
        "rank_pattern": ranks,
    }
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def content(root):
    """Return every file of a directory with its bytes."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@settings(max_examples=15, deadline=None)
@given(
    modules.filter(lambda drawn: any(rank for _, rank in drawn)),
    st.sampled_from([None, "1KB", "20KB"]),
    st.sampled_from([None, "float32", "bfloat16"]),
)
def test_any_number_of_workers_writes_the_same_directory(drawn, max_shard_size, dtype):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_inputs(root, drawn)
        outputs = []
        for workers in (1, 2, 4):
            out = root / str(workers) / "merged"
            report = lora_merge.merge(
                base=root / "base", adapter=root / "adapter", out=out,
                workers=workers, max_shard_size=max_shard_size, dtype=dtype, verify="full",
            )  # fmt: skip
            assert report.verdict.ok
            outputs.append(content(out))
    assert outputs[1] == outputs[0]
    assert outputs[2] == outputs[0]
    assert any(path.endswith(".safetensors") for path in outputs[0])


N_EXPERTS, VOCAB = 3, 90
kinds = st.sampled_from(["lora", "dora", "experts"])
sizes = st.tuples(st.integers(1, 150), st.integers(1, 40), st.integers(1, 9))
layers = st.lists(st.tuples(kinds, sizes, st.sampled_from(DTYPES)), min_size=1, max_size=5)


def write_adapter(root, tensors, **config):
    """Write a LoRA adapter."""
    root.mkdir()
    tensors = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, root / "adapter_model.safetensors", {"format": "pt"})
    table = {"peft_type": "LORA", "r": 2, "lora_alpha": 5, **config}
    (root / "adapter_config.json").write_text(json.dumps(table))


def write_mixture(root, drawn):
    """Write a base with an embedding, linear layers and experts, and three adapters for it: LoRA, DoRA, experts."""
    generator = torch.Generator().manual_seed(len(drawn))

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    base = {"embed_tokens.weight": random(VOCAB, 8)}
    adapters = {
        "lora": {
            "embed_tokens.lora_embedding_A": random(2, VOCAB),
            "embed_tokens.lora_embedding_B": random(8, 2),
        },
        "dora": {},
        "experts": {},
    }
    ranks = {kind: {} for kind in adapters}
    for n, (kind, (n_out, n_in, rank), dtype) in enumerate(drawn):
        if kind == "experts":
            base[f"layers.{n}.experts.w"] = random(N_EXPERTS, n_out, n_in + n_out).to(dtype)
            a, b = random(N_EXPERTS * rank, n_in + n_out), random(n_out, rank * N_EXPERTS)
            module, ranks[kind][f"layers.{n}.experts.w"] = f"layers.{n}.experts", rank
        else:
            base[f"layers.{n}.proj.weight"] = random(n_out, n_in).to(dtype)
            a, b = random(rank, n_in), random(n_out, rank)
            module = f"layers.{n}.proj"
            ranks[kind][module] = rank
        adapters[kind] |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        if kind == "dora":
            adapters[kind][f"{module}.lora_magnitude_vector"] = random(n_out).abs() + 0.1
    (root / "base").mkdir()
    save_file(base, root / "base" / "model.safetensors", {"format": "pt"})
    (root / "base" / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    own = {
        "lora": {"target_modules": ["embed_tokens", *ranks["lora"]]},
        "dora": {"target_modules": list(ranks["dora"]), "use_dora": True},
        "experts": {"target_modules": [], "target_parameters": list(ranks["experts"])},
    }
    made = []
    for kind, tensors in adapters.items():
        if tensors:
            write_adapter(root / kind, tensors, rank_pattern=ranks[kind], **own[kind])
            made.append(root / kind)
    return made


@pytest.mark.parametrize("combine", ["linear", "ties", "dare_linear"])
@settings(max_examples=12, deadline=None)
@given(layers)
def test_every_executor_writes_the_bytes_of_the_serial_one_for_a_plan_of_many_kinds(combine, drawn):
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        made = write_mixture(root, drawn)
        plan = lora_merge.plan(base=root / "base", adapter=made, combine=combine, density=0.5, seed=3)
        written = {}
        for executor, n_workers in [("serial", 1), ("threads", 2), ("threads", 5)]:
            out = root / f"{executor}-{n_workers}"
            records = fill(plan, out, executor, n_workers)
            written[out.name] = (records, content(out))
        assert written["threads-2"] == written["serial-1"]
        assert written["threads-5"] == written["serial-1"]
        before, after = (load_file(at / "model.safetensors") for at in (root / "base", root / "serial-1"))
        n_deltas = sum(isinstance(step.op, Merge) and bool(step.op.deltas) for step in plan.steps)
        assert n_deltas == len(drawn) + 1
        assert not torch.equal(after["embed_tokens.weight"], before["embed_tokens.weight"])


def test_what_is_dropped_at_random_is_the_same_beside_layers_of_peft_that_draw_too(tmp_path_factory):
    workshop = tmp_path_factory.mktemp("random")
    kinds = [next(kind for kind in KINDS if kind.name == name) for name in ("LoHa", "LoRA")]
    cases = [building.case(workshop, kind, "llama", "bfloat16") for kind in kinds]
    outputs = set()
    for n, workers in enumerate([1, *[4] * 7]):
        out = workshop / f"out-{n}"
        lora_merge.merge(
            base=cases[0].base, adapter=[case.adapter for case in cases], out=out, combine="dare_linear",
            workers=workers, verify="none",
        )  # fmt: skip
        outputs.add((out / "model.safetensors").read_bytes())
    assert len(outputs) == 1


@pytest.mark.parametrize("shape", [(5, 5, 17), (7, 9, 40), (64, 4, 64)], ids=str)
def test_a_worker_thread_multiplies_with_the_bits_of_the_callers(shape, tmp_path):
    n_out, rank, n_in = shape
    generator = torch.Generator().manual_seed(1)
    (tmp_path / "base").mkdir()
    weights = {f"layers.{n}.proj.weight": torch.zeros(n_out, n_in) for n in range(4)}
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    factors = {}
    for n in range(4):
        factors[f"layers.{n}.proj.lora_A.weight"] = torch.randn(rank, n_in, generator=generator)
        factors[f"layers.{n}.proj.lora_B.weight"] = torch.randn(n_out, rank, generator=generator)
    write_adapter(tmp_path / "adapter", factors, r=rank, lora_alpha=rank, target_modules=["proj"])
    merged = {}
    for workers in (1, 4):
        out = tmp_path / f"out-{workers}"
        lora_merge.merge(base=tmp_path / "base", adapter=tmp_path / "adapter", out=out, workers=workers)
        merged[workers] = load_file(out / "model.safetensors")
    for name, tensor in merged[1].items():
        assert torch.equal(merged[4][name], tensor), name
