"""Weights that are merged before torch is loaded: the same bytes and the same records as all others."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.core.plan import Merge
from lora_merge.merging import writing
from lora_merge.merging.filling import Order, merges
from lora_merge.merging.worker import TorchLoading, can_be_begun, early
from lora_merge.merging.worker.specs import BeginWorker
from lora_merge.native.library import hidden, library
from tests.filling import fill

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base whose tensors have several tiles of unequal height."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("early") / "base"
    config = LlamaConfig(
        hidden_size=256, intermediate_size=1000, num_hidden_layers=1, num_attention_heads=8, vocab_size=256
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    """Return a function that makes an adapter: dtype of its factors, fields of its configuration."""

    def made(dtype=torch.float32, **fields):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        fields = {"r": 16, "lora_alpha": 16, "target_modules": TARGETS, "init_lora_weights": False, **fields}
        root = tmp_path / "adapter"
        get_peft_model(model, LoraConfig(**fields)).save_pretrained(root)
        file = root / "adapter_model.safetensors"
        factors = load_file(file)
        save_file({name: factor.to(dtype).contiguous() for name, factor in factors.items()}, file)
        return root

    return made


def plan_of(base, adapter, **fields):
    return lora_merge.plan(base=base, adapter=adapter, **fields)


@pytest.fixture
def made(base, adapter):
    """Return a function that makes an adapter and returns the plan of a merge of it."""
    return lambda *args, **fields: plan_of(base, adapter(*args, **fields))


def ops(plan):
    return [step.op for step in plan.steps if isinstance(step.op, Merge)]


@pytest.fixture
def begun(monkeypatch):
    """What was begun, and what came of it."""
    found = []
    call = BeginWorker.__call__

    def noted(self, piece):
        result = call(self, piece)
        found.append(result)
        return result

    monkeypatch.setattr(BeginWorker, "__call__", noted)
    return found


@pytest.mark.parametrize(
    ("executor", "elements"), [("serial", None), ("serial", 20_000), ("threads", 20_000)]
)
@pytest.mark.parametrize("alpha", [16, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_and_records_are_those_of_any_merge(made, begun, tmp_path, executor, elements, alpha, dtype):
    plan = made(dtype, lora_alpha=alpha)
    wanted = fill(plan, tmp_path / "wanted", tile_elements=elements)
    assert not begun
    found = fill(plan, tmp_path / "found", executor, 2, elements, is_early=True)
    assert len([one for one in begun if one is not None]) == len(TARGETS)
    assert found == wanted
    assert any(record.blocks for record in found)
    assert all(record.survival for record in found if "q_proj" in record.name)
    for file in plan.files:
        assert (tmp_path / "found" / file.name).read_bytes() == (tmp_path / "wanted" / file.name).read_bytes()


def test_where_torch_sums_in_another_order_the_weight_is_merged_again(
    base, adapter, begun, tmp_path, monkeypatch
):
    plan = plan_of(base, adapter())
    wanted = fill(plan, tmp_path / "wanted")
    monkeypatch.setattr(early, "is_as_torch", lambda rank, scale: False)
    add = early.Factors.add

    def differing(self, frame, start, end):
        done = add(self, frame, start, end)
        frame.out[:] ^= 1
        return done

    monkeypatch.setattr(early.Factors, "add", differing)
    assert fill(plan, tmp_path / "found", is_early=True) == wanted
    assert len(begun) == len(TARGETS)
    for file in plan.files:
        assert (tmp_path / "found" / file.name).read_bytes() == (tmp_path / "wanted" / file.name).read_bytes()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, torch.finfo(torch.bfloat16).max])
def test_what_is_not_finite_is_left_to_the_merge(base, adapter, begun, tmp_path, value):
    root, broken = adapter(lora_alpha=1 << 20), tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][900, 17:90] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    factors = load_file(root / "adapter_model.safetensors")
    if value == torch.finfo(torch.bfloat16).max:
        for name in factors:
            if "up_proj" in name:
                factors[name] = factors[name].abs() * 1e17
        save_file(factors, root / "adapter_model.safetensors")
    plan = plan_of(broken, root)
    wanted = fill(plan, tmp_path / "wanted", tile_elements=20_000)
    # NaN is not equal to itself, so texts are compared.
    assert str(fill(plan, tmp_path / "found", tile_elements=20_000, is_early=True)) == str(wanted)
    assert begun.count(None) == 1
    assert not all(record.finite for record in wanted)
    name = plan.files[0].name
    assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1},
        {"r": 64},
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    ],
    ids=str,
)
def test_other_adapters_are_left_to_torch(base, adapter, fields):
    changed = ops(plan_of(base, adapter(**fields)))
    assert changed
    assert not any(map(early.can_begin, changed))


@pytest.mark.parametrize(
    "fields", [{"dtype": "float32"}, {"dtype": "float16"}, {"rounding": "adapter"}], ids=str
)
def test_other_outputs_are_left_to_torch(base, adapter, fields):
    changed = ops(plan_of(base, adapter(), **fields))
    assert changed
    assert not any(map(early.can_begin, changed))


def test_without_compiled_code_nothing_is_begun(base, adapter):
    with hidden():
        assert not any(map(early.can_begin, ops(plan_of(base, adapter()))))


def test_a_piece_of_several_outputs_is_left_to_torch(base, adapter):
    plan = plan_of(base, adapter())
    left = [(number, step) for number in (0, 1) for step in plan.steps]
    pieces = merges(left, Order([plan, plan]))
    assert pieces
    assert not any(map(can_be_begun, pieces))


@pytest.fixture
def slow_torch(monkeypatch):
    """Have torch loaded only when every piece was asked for."""
    over = threading.Event()

    class Slow(TorchLoading):
        def _load(self):
            over.wait()
            super()._load()

    monkeypatch.setattr(writing, "TorchLoading", Slow)
    begin = writing._Driver._begin

    def beginning(self, *args):
        try:
            return begin(self, *args)
        finally:
            over.set()

    monkeypatch.setattr(writing._Driver, "_begin", beginning)
    yield
    over.set()


@pytest.mark.usefixtures("slow_torch")
@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_whole_merge_is_the_same(base, adapter, begun, tmp_path, n_workers):
    root = adapter(lora_alpha=11)
    merge = {"base": str(base), "adapter": str(root), "workers": n_workers}
    report = lora_merge.merge(out=str(tmp_path / "one"), **merge)
    assert len([one for one in begun if one is not None]) == len(TARGETS)
    with hidden():
        expected = lora_merge.merge(out=str(tmp_path / "other"), **merge)
    assert len(begun) == len(TARGETS)
    assert report.survival == expected.survival
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("slow_torch")
@pytest.mark.parametrize("level", ["sample", "full"])
def test_a_fault_in_what_was_begun_is_noticed(base, adapter, cli, tmp_path, monkeypatch, level):
    root, add, spoilt = adapter(), early.Factors.add, []

    def spoiling(self, frame, start, end):
        done = add(self, frame, start, end)
        if not spoilt:
            spoilt.append(start)
            frame.out[3] = frame.out[4]
        return done

    monkeypatch.setattr(early.Factors, "add", spoiling)
    result = cli("--base", base, "--adapter", root, "--out", tmp_path / "out", "--verify", level)
    assert spoilt
    assert result.exit_code == exits.VERIFY, result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("slow_torch")
def test_an_interrupted_beginning_is_resumed(base, adapter, cli, tmp_path, monkeypatch):
    root, add, calls = adapter(), early.Factors.add, []

    def interrupted(self, frame, start, end):
        calls.append(start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(self, frame, start, end)

    command = ("--base", base, "--adapter", root, "--out", tmp_path / "out", "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(early.Factors, "add", interrupted)
        assert cli(*command).exit_code == exits.INTERRUPTED
    assert not (tmp_path / "out").exists()
    assert cli(*command, "--resume").exit_code == 0
    lora_merge.merge(base=str(base), adapter=str(root), out=str(tmp_path / "other"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("slow_torch")
def test_an_adapter_that_changes_meanwhile_is_noticed(base, adapter, cli, tmp_path, monkeypatch):
    root, load, changed = adapter(), early.load_numbers, []

    def changing(ref):
        if not changed:
            changed.append(ref)
            file = root / "adapter_model.safetensors"
            factors = load_file(file)
            save_file({name: factor * 2 for name, factor in factors.items()}, file)
        return load(ref)

    monkeypatch.setattr(early, "load_numbers", changing)
    result = cli("--base", base, "--adapter", root, "--out", tmp_path / "out")
    assert changed
    assert result.exit_code != 0
    assert "chang" in result.stderr
    assert not (tmp_path / "out").exists()
