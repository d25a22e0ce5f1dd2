"""Weights that are merged without torch: the same bytes and the same records as with it."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import astuple, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.core.plan import Merge
from lora_merge.merging import writing
from lora_merge.merging.worker import TorchLoading, plain
from lora_merge.merging.worker.merger import Merger
from lora_merge.native.library import hidden, library
from tests.filling import fill, fill_all

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")

SUMS_ALIKE = torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether torch sums a product in the order of the rank (`lora_merge.merging.worker.adding`)."""

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
def merged(monkeypatch):
    """The names of the weights that were merged without torch, or were to be; and what came of it."""
    found = []
    merge = Merger._merge_hosted

    def noted(self, orders):
        records = merge(self, orders)
        found.append((orders[0].step.name, records is not None))
        return records

    monkeypatch.setattr(Merger, "_merge_hosted", noted)
    return found


def same_records(found, wanted):
    """Compare records. What was kept of a change is summed in another order without torch."""
    for one, other in zip(found, wanted, strict=True):
        assert replace(one, survival=None) == replace(other, survival=None)
        assert (one.survival is None) == (other.survival is None)
        if one.survival is not None:
            assert astuple(one.survival) == pytest.approx(astuple(other.survival), rel=1e-5)


def same_files(plan, root, other):
    for file in plan.files:
        assert (root / file.name).read_bytes() == (other / file.name).read_bytes()


@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="another matrix library may sum in another order"
)
@pytest.mark.parametrize(
    ("executor", "elements"), [("serial", None), ("serial", 20_000), ("threads", 20_000)]
)
@pytest.mark.parametrize("alpha", [16, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_and_records_are_those_of_torch(made, merged, tmp_path, executor, elements, alpha, dtype):
    plan = made(dtype, lora_alpha=alpha)
    with hidden():
        wanted = fill(plan, tmp_path / "wanted", tile_elements=elements)
    assert not merged
    found = fill(plan, tmp_path / "found", executor, 2, elements)
    assert len(merged) == len(TARGETS)
    assert all(done for _, done in merged)
    same_records(found, wanted)
    assert any(record.blocks for record in found)
    assert all(record.survival for record in found if "q_proj" in record.name)
    same_files(plan, tmp_path / "found", tmp_path / "wanted")


def test_outputs_that_are_made_together_have_the_bytes_of_each_alone(made, merged, tmp_path):
    plans = {name: made(lora_alpha=alpha) for name, alpha in (("one", 16), ("two", 11))}
    together = fill_all({tmp_path / name: plan for name, plan in plans.items()}, tile_elements=20_000)
    assert len(merged) == len(TARGETS)
    for name, plan in plans.items():
        alone = fill(plan, tmp_path / f"{name} alone", tile_elements=20_000)
        assert together[tmp_path / name] == alone
        same_files(plan, tmp_path / name, tmp_path / f"{name} alone")


def test_beside_an_output_that_needs_torch_the_bytes_are_the_same(made, merged, tmp_path):
    plan = made()
    dora = made(use_dora=True)
    fill_all({tmp_path / "dora": dora, tmp_path / "plain": plan})
    assert not merged
    fill(plan, tmp_path / "alone")
    assert len(merged) == len(TARGETS)
    same_files(plan, tmp_path / "plain", tmp_path / "alone")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, torch.finfo(torch.bfloat16).max])
def test_what_is_not_finite_is_left_to_torch(base, adapter, merged, tmp_path, value):
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
    with hidden():
        wanted = fill(plan, tmp_path / "wanted", tile_elements=20_000)
    found = fill(plan, tmp_path / "found", tile_elements=20_000)
    assert [name for name, done in merged if not done] == ["model.layers.0.mlp.up_proj.weight"]
    assert len(merged) == len(TARGETS)
    assert [record.finite for record in found] == [record.finite for record in wanted]
    assert not all(record.finite for record in wanted)
    same_files(plan, tmp_path / "found", tmp_path / "wanted")


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 1},
        {"r": 129},
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    ],
    ids=str,
)
def test_other_adapters_are_left_to_torch(base, adapter, fields):
    changed = ops(plan_of(base, adapter(**fields)))
    assert changed
    assert not any(map(plain.is_plain, changed))


@pytest.mark.parametrize(
    "fields", [{"dtype": "float32"}, {"dtype": "float16"}, {"rounding": "adapter"}], ids=str
)
def test_other_outputs_are_left_to_torch(base, adapter, fields):
    changed = ops(plan_of(base, adapter(), **fields))
    assert changed
    assert not any(map(plain.is_plain, changed))


def test_without_compiled_code_all_is_left_to_torch(base, adapter):
    with hidden():
        assert not any(map(plain.is_plain, ops(plan_of(base, adapter()))))


def test_an_odd_number_of_columns_is_left_to_torch(base, adapter):
    op = ops(plan_of(base, adapter()))[0]
    assert plain.is_plain(op)
    view = replace(op.view, columns=op.view.columns - 1)
    assert not plain.is_plain(replace(op, view=view))


@pytest.mark.parametrize("n_workers", [1, 2])
def test_a_whole_merge_is_the_same(base, adapter, merged, tmp_path, n_workers):
    root = adapter(lora_alpha=11)
    merge = {"base": str(base), "adapter": str(root), "workers": n_workers}
    report = lora_merge.merge(out=str(tmp_path / "one"), **merge)
    assert len(merged) == len(TARGETS)
    with hidden():
        expected = lora_merge.merge(out=str(tmp_path / "other"), **merge)
    assert len(merged) == len(TARGETS)
    assert report.survival.keys() == expected.survival.keys()
    for name, found in report.survival.items():
        assert astuple(found) == pytest.approx(astuple(expected.survival[name]), rel=1e-5)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    if SUMS_ALIKE:
        assert all(torch.equal(one[name], other[name]) for name in one)


PROGRAM = """
import sys
from lora_merge.cli import main
try:
    main(sys.argv[1:], prog_name="lora-merge")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def run_program(*arguments):
    """Run the command in another process; return its exit code, and whether torch was loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr.splitlines()[-1] == "True", done.stdout + done.stderr


@pytest.mark.parametrize("level", ["sample", "full"])
@pytest.mark.parametrize("executor", ["threads", "processes"])
def test_torch_is_not_loaded(base, adapter, tmp_path, level, executor):
    merge = ("--base", base, "--adapter", adapter(), "--out", tmp_path / "out", "--executor", executor)
    assert run_program(*merge, "--verify", level)[:2] == (0, False)
    assert run_program("verify", tmp_path / "out", "--level", level)[:2] == (0, False)
    # The first value of a merged row: verification says what is wrong, for which it loads torch.
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][999, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    code, is_loaded, text = run_program("verify", tmp_path / "out", "--level", level)
    assert (code, is_loaded) == (exits.VERIFY, True)
    assert "row 999, column 0" in text


def test_verification_of_a_rounding_for_the_adapter_loads_no_torch(base, adapter, tmp_path):
    merge = ("--base", base, "--adapter", adapter(), "--out", tmp_path / "out", "--rounding", "adapter")
    assert run_program(*merge)[:2] == (0, True)
    for level in ("sample", "full"):
        assert run_program("verify", tmp_path / "out", "--level", level)[:2] == (0, False)
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][999, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    code, is_loaded, text = run_program("verify", tmp_path / "out")
    assert (code, is_loaded) == (exits.VERIFY, True)
    assert "row 999, column 0" in text


def test_torch_is_loaded_for_what_needs_it(base, adapter, tmp_path):
    merge = ("--base", base, "--adapter", adapter(use_dora=True), "--out", tmp_path / "out")
    assert run_program(*merge)[:2] == (0, True)
    assert run_program("verify", tmp_path / "out")[:2] == (0, True)


def test_where_only_some_weights_need_torch_the_others_are_merged_meanwhile(
    base, adapter, merged, tmp_path, monkeypatch
):
    root = adapter(rank_pattern={"up_proj": 160})
    plan = plan_of(base, root)
    assert sorted(map(plain.is_plain, ops(plan))) == [False, True, True, True]
    over = threading.Event()

    class Slow(TorchLoading):
        def _load(self):
            over.wait(60)
            super()._load()

    merge = Merger._merge_hosted

    def merging(self, orders):
        found = merge(self, orders)
        if len(merged) == len(TARGETS) - 1:
            over.set()
        return found

    monkeypatch.setattr(writing, "TorchLoading", Slow)
    monkeypatch.setattr(Merger, "_merge_hosted", merging)
    lora_merge.merge(base=str(base), adapter=str(root), out=str(tmp_path / "out"))
    assert over.is_set()
    assert len(merged) == len(TARGETS) - 1
    fill(plan, tmp_path / "wanted")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "wanted"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("level", ["sample", "full"])
def test_a_fault_is_noticed(base, adapter, cli, tmp_path, monkeypatch, level):
    root, add, spoilt = adapter(), plain.Addend.add, []

    def spoiling(self, frame, tile):
        done = add(self, frame, tile)
        if not spoilt:
            spoilt.append(tile.start)
            frame.out[3] = frame.out[4]
        return done

    monkeypatch.setattr(plain.Addend, "add", spoiling)
    result = cli("--base", base, "--adapter", root, "--out", tmp_path / "out", "--verify", level)
    assert spoilt
    assert result.exit_code == exits.VERIFY, result.output
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_is_resumed(base, adapter, cli, tmp_path, monkeypatch):
    root, add, calls = adapter(), plain.Addend.add, []

    def interrupted(self, frame, tile):
        calls.append(tile.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(self, frame, tile)

    command = ("--base", base, "--adapter", root, "--out", tmp_path / "out", "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(plain.Addend, "add", interrupted)
        assert cli(*command).exit_code == exits.INTERRUPTED
    assert not (tmp_path / "out").exists()
    assert cli(*command, "--resume").exit_code == 0
    lora_merge.merge(base=str(base), adapter=str(root), out=str(tmp_path / "other"))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_that_changes_meanwhile_is_noticed(base, adapter, cli, tmp_path, monkeypatch):
    root, load, changed = adapter(), plain.load_numbers, []

    def changing(ref):
        if not changed:
            changed.append(ref)
            file = root / "adapter_model.safetensors"
            factors = load_file(file)
            save_file({name: factor * 2 for name, factor in factors.items()}, file)
        return load(ref)

    monkeypatch.setattr(plain, "load_numbers", changing)
    result = cli("--base", base, "--adapter", root, "--out", tmp_path / "out")
    assert changed
    assert result.exit_code != 0
    assert "chang" in result.stderr
    assert not (tmp_path / "out").exists()
