"""Codes that are merged without torch: the same bytes and the same records as with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.codecs import CODECS
from lora_merge.codecs.compiled import signed_bytes, whole_numbers
from lora_merge.codecs.host import host_grid, is_host, levels_of
from lora_merge.codecs.tables import values_of_codes, values_of_e2m1
from lora_merge.core.plan import Combination, Merge, Rounding
from lora_merge.core.weight import Storage, Tile
from lora_merge.formats.weights import WeightReader, is_read_alone
from lora_merge.merging.worker import coded, host, needs_torch
from lora_merge.merging.worker.merger import Merger
from lora_merge.native.library import hidden, library
from tests.filling import fill, fill_all
from tests.unit.test_plain import run_program, same_files, same_records

pytestmark = pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
SCHEMES = ["fp8", "fp8-block", "fp8-channel", "int8", "mxfp8", "int4", "int4-g32", "mxfp4", "nvfp4"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("dense") / "base"
    config = LlamaConfig(
        hidden_size=256, intermediate_size=896, num_hidden_layers=1, num_attention_heads=8, vocab_size=256
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    """Return a function that makes an adapter of some fields."""
    made = {}

    def make(**fields):
        key = json.dumps(fields, sort_keys=True)
        if key not in made:
            from peft import LoraConfig, get_peft_model
            from transformers import AutoModelForCausalLM

            torch.manual_seed(len(made))
            model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
            fields = {
                "r": 8,
                "lora_alpha": 8,
                "target_modules": TARGETS,
                "init_lora_weights": False,
                **fields,
            }
            made[key] = tmp_path_factory.mktemp("adapter")
            get_peft_model(model, LoraConfig(**fields)).save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def base(dense, adapter, tmp_path_factory):
    """Return a function that makes a quantised base."""
    made = {}

    def make(scheme):
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp(scheme) / "base"
            lora_merge.merge(
                base=str(dense), adapter=str(adapter(r=4)), out=str(made[scheme]), quantize=scheme
            )
        return made[scheme]

    return make


def plan_of(base, adapter, **fields):
    return lora_merge.plan(base=base, adapter=adapter, out_storage="base", allow_again=True, **fields)


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


@pytest.fixture
def by_torch(monkeypatch):
    """Return a function that makes the files of a plan with torch."""

    def made(plan, root, **fields):
        with monkeypatch.context() as patch:
            patch.setattr(host, "is_coded", lambda _: False)
            assert needs_torch(plan.steps)
            return fill(plan, root, **fields)

    return made


@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_and_records_are_those_of_torch(base, adapter, merged, by_torch, tmp_path, scheme, rounding):
    plan = plan_of(base(scheme), adapter(lora_alpha=11), rounding=rounding)
    assert not needs_torch(plan.steps)
    # A tile of codes has four times as many.
    wanted = by_torch(plan, tmp_path / "wanted", tile_elements=5_000)
    assert not merged
    found = fill(plan, tmp_path / "found", "threads", 2, 5_000)
    assert len(merged) == len(TARGETS)
    assert all(done for _, done in merged)
    same_records(found, wanted)
    assert any(record.blocks for record in found)
    effects = [record.survival.effect_norm for record in found if record.survival]
    assert len(effects) == len(TARGETS)
    assert all(effect > 0 for effect in effects)
    same_files(plan, tmp_path / "found", tmp_path / "wanted")


def test_outputs_that_are_made_together_have_the_bytes_of_each_alone(base, adapter, merged, tmp_path):
    plans = {
        name: plan_of(base("fp8-block"), adapter(lora_alpha=alpha), rounding="adapter")
        for name, alpha in (("one", 16), ("two", 11))
    }
    together = fill_all({tmp_path / name: plan for name, plan in plans.items()}, tile_elements=5_000)
    assert len(merged) == len(TARGETS)
    for name, plan in plans.items():
        alone = fill(plan, tmp_path / f"{name} alone", tile_elements=5_000)
        assert together[tmp_path / name] == alone
        same_files(plan, tmp_path / name, tmp_path / f"{name} alone")


def test_beside_an_output_that_needs_torch_the_bytes_are_the_same(base, adapter, merged, tmp_path):
    plan = plan_of(base("fp8-block"), adapter(), rounding="adapter")
    dora = plan_of(base("fp8-block"), adapter(use_dora=True), rounding="adapter")
    fill_all({tmp_path / "dora": dora, tmp_path / "plain": plan})
    assert not merged
    fill(plan, tmp_path / "alone")
    assert len(merged) == len(TARGETS)
    same_files(plan, tmp_path / "plain", tmp_path / "alone")


@pytest.mark.parametrize("value", [0.0, -1.0, torch.nan, torch.inf])
def test_odd_scales_are_left_to_torch(base, adapter, merged, by_torch, tmp_path, value):
    broken = tmp_path / "broken"
    shutil.copytree(base("fp8-block"), broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name][1, 1] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    plan = plan_of(broken, adapter())
    wanted = by_torch(plan, tmp_path / "wanted", tile_elements=5_000)
    found = fill(plan, tmp_path / "found", tile_elements=5_000)
    assert [name for name, done in merged if not done] == ["model.layers.0.mlp.up_proj.weight"]
    # One of the tiles before it had finite values, which are still in the buffer.
    assert all(record.finite for record in wanted) == (abs(value) < 2)
    assert [record.finite for record in found] == [record.finite for record in wanted]
    same_files(plan, tmp_path / "found", tmp_path / "wanted")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38, 0.0])
@pytest.mark.parametrize("role", ["A", "B"])
def test_odd_factors_are_left_to_torch_or_the_same(base, adapter, by_torch, tmp_path, value, role):
    root = tmp_path / "odd"
    shutil.copytree(adapter(), root)
    factors = load_file(root / "adapter_model.safetensors")
    for name, factor in factors.items():
        if "up_proj" in name and f"lora_{role}" in name:
            factor.fill_(value)
    save_file(factors, root / "adapter_model.safetensors")
    try:
        plan = plan_of(base("fp8-block"), root)
    except lora_merge.LoraMergeError:
        # Factors with NaN or infinity are refused before anything is merged.
        assert not value < 1e39
        return
    wanted = by_torch(plan, tmp_path / "wanted")
    found = fill(plan, tmp_path / "found")
    assert [record.finite for record in found] == [record.finite for record in wanted]
    same_files(plan, tmp_path / "found", tmp_path / "wanted")


@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
@pytest.mark.parametrize("level", ["sample", "full"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4", "nvfp4"])
def test_no_storage_needs_torch(base, adapter, tmp_path, scheme, level, rounding):
    merge = (
        "--base",
        base(scheme),
        "--adapter",
        adapter(lora_alpha=1),
        "--out",
        tmp_path / "out",
        "--allow-again",
    )
    how = ("--out-storage", "base", "--rounding", rounding, "--verify", level, "--allow-loss")
    assert run_program(*merge, *how)[:2] == (0, False)
    assert run_program("verify", tmp_path / "out", "--level", level)[:2] == (0, False)


@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
@pytest.mark.parametrize("level", ["sample", "full"])
def test_torch_is_not_loaded(base, adapter, tmp_path, level, rounding):
    merge = ("--base", base("fp8-block"), "--adapter", adapter(), "--out", tmp_path / "out", "--allow-again")
    how = ("--out-storage", "base", "--rounding", rounding, "--verify", level, "--allow-loss")
    assert run_program(*merge, *how)[:2] == (0, False)
    assert run_program("verify", tmp_path / "out", "--level", level)[:2] == (0, False)
    # Verification says what is wrong, for which it loads torch.
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"].view(torch.uint8)[895, 0] ^= 0x20
    save_file(tensors, file, metadata={"format": "pt"})
    code, is_loaded, text = run_program("verify", tmp_path / "out", "--level", level)
    assert (code, is_loaded) == (exits.VERIFY, True)
    assert "row 895, column 0" in text


@pytest.mark.parametrize("level", ["sample", "full"])
@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
def test_a_fault_is_noticed(base, adapter, cli, tmp_path, monkeypatch, level, rounding):
    add, spoilt = coded.CodedAddend.add, []

    def spoiling(self, frame, tile):
        done = add(self, frame, tile)
        if not spoilt:
            spoilt.append(tile.start)
            # Codes of another row.
            written = frame.written["weight"].reshape(tile.end - tile.start, -1)
            written[0] = written[1]
        return done

    monkeypatch.setattr(coded.CodedAddend, "add", spoiling)
    command = (
        "--base",
        base("fp8-block"),
        "--adapter",
        adapter(),
        "--out",
        tmp_path / "out",
        "--allow-again",
    )
    how = ("--out-storage", "base", "--rounding", rounding, "--verify", level, "--allow-loss")
    result = cli(*command, *how)
    assert spoilt
    assert result.exit_code == exits.VERIFY, result.output
    assert not (tmp_path / "out").exists()


def test_an_interrupted_merge_is_resumed(base, adapter, cli, tmp_path, monkeypatch):
    add, calls = coded.CodedAddend.add, []

    def interrupted(self, frame, tile):
        calls.append(tile.start)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return add(self, frame, tile)

    command = ("--base", base("int8"), "--adapter", adapter(), "--workers", "1", "--allow-again")
    command += ("--out-storage", "base", "--allow-loss")
    with monkeypatch.context() as patch:
        patch.setattr(coded.CodedAddend, "add", interrupted)
        assert cli(*command, "--out", tmp_path / "out").exit_code == exits.INTERRUPTED
    assert not (tmp_path / "out").exists()
    assert cli(*command, "--out", tmp_path / "out", "--resume").exit_code == 0
    assert cli(*command, "--out", tmp_path / "other").exit_code == 0
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "other"))
    assert one == other


def test_other_merges_are_left_to_torch(base, adapter):
    op = ops(plan_of(base("fp8-block"), adapter()))[0]
    (delta,) = op.deltas
    assert coded.is_coded(op)
    settings = dict(op.target.settings)
    others = [
        replace(op, deltas=(delta, delta)),
        replace(op, deltas=(replace(delta, adapter_weight=0.5),)),
        replace(op, rounding=Rounding("stochastic")),
        replace(op, combination=Combination("ties", 0.5, 0, 0, "")),
        replace(op, on_stored_grid=False),
        replace(op, source=replace(op.source, shape=(2, op.source.shape[0] // 2, op.source.shape[1]))),
        replace(op, source=replace(op.source, storage=Storage("gptq", "I32", tuple(settings.items())))),
    ]
    assert not any(map(coded.is_coded, others))
    assert not any(map(coded.is_coded, ops(plan_of(base("fp8-block"), adapter(use_dora=True)))))
    assert not any(map(coded.is_coded, ops(plan_of(base("fp8-block"), adapter(r=64)))))
    with hidden():
        assert not coded.is_coded(op)


def cut(content, part):
    ((first, nbytes),) = part.ranges
    return torch.frombuffer(bytearray(content[first : first + nbytes]), dtype=torch.uint8)


@pytest.mark.parametrize("codes", ["F8_E4M3", "F8_E5M2", "I8"])
@pytest.mark.parametrize("scale", ["F32", "BF16", "F16", "U8"])
@pytest.mark.parametrize("block", [(0, 0), (1, 0), (128, 128), (48, 100), (1, 32)])
def test_values_are_those_of_the_codec(codes, scale, block):
    height, width = 300, 224
    generator = torch.Generator().manual_seed(0)
    settings = {"block_rows": block[0], "block_columns": block[1], "codes": codes, "scale": scale}
    storage = Storage("scaled", codes, tuple(sorted(settings.items())))
    assert is_host(storage, (height, width))
    assert not is_host(storage, (2, height, width))
    grid = -(-height // (block[0] or height)), -(-width // (block[1] or width))
    if scale == "U8":
        scales = torch.randint(100, 140, grid, dtype=torch.uint8, generator=generator)
    else:
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[scale]
        scales = (torch.rand(grid, generator=generator) + 0.01).to(dtype)
    stored = torch.randint(0, 256, (height, width), dtype=torch.uint8, generator=generator)
    content = {"weight": stored.numpy().tobytes(), "scale": scales.view(torch.uint8).numpy().tobytes()}
    for start, end in ((0, height), (64, 200), (299, 300)):
        tile = Tile((height, width), height, start, end)
        ranges = CODECS["scaled"].ranges(tile, storage)
        raw = {role: cut(content[role], part) for role, part in ranges.items()}
        dtypes = {"scale": scales.dtype, "weight": torch.int8 if codes == "I8" else torch.uint8}
        parts = {role: raw[role].view(dtypes[role]).view(part.shape) for role, part in ranges.items()}
        wanted = torch.empty(end - start, width)
        with hidden():
            CODECS["scaled"].decode(tile, parts, wanted, storage)
        found = host_grid(tile, {role: part.numpy() for role, part in raw.items()}, storage)
        values = torch.from_numpy(found.values(found.stored))
        assert torch.equal(
            values.view(torch.int32)[~wanted.isnan()], wanted.view(torch.int32)[~wanted.isnan()]
        )
        assert torch.equal(values.isnan(), wanted.isnan())


CPU = torch.device("cpu")
LEVELS = {
    "F8_E4M3": lambda: values_of_codes("F8_E4M3", CPU),
    "F8_E5M2": lambda: values_of_codes("F8_E5M2", CPU),
    "F8_E8M0": lambda: values_of_codes("F8_E8M0", CPU),
    "I8": signed_bytes,
    "E2M1": values_of_e2m1,
    "4 bits": lambda: whole_numbers(4, 8),
    "8 bits": lambda: whole_numbers(8, 128),
}


@pytest.mark.parametrize("codes", LEVELS)
def test_levels_are_those_of_torch(codes):
    found, wanted = torch.from_numpy(levels_of(codes)), LEVELS[codes]()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found[~found.isnan()].view(torch.int32), wanted[~found.isnan()].view(torch.int32))


@pytest.mark.parametrize("scheme", [None, "fp8-block", "int8", "int4", "mxfp4", "nvfp4", "int4-asym"])
def test_rows_that_are_read_without_torch_are_the_same(base, dense, adapter, scheme):
    plan = lora_merge.plan(base=base(scheme) if scheme else dense, adapter=adapter(), allow_again=True)
    for op in ops(plan):
        assert is_read_alone(op.source) == (scheme != "int4-asym")
        with WeightReader(op.source, op.view.n_rows) as reader:
            for start, end in ((0, 7), (100, 230)):
                numbers = reader.numbers(start, end)
                assert numbers.tobytes() == reader.values(start, end).numpy().tobytes()
