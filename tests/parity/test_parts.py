"""Deltas that own a part of a stored tensor: experts one by one on a base that stacks them, and the other way round.

The oracle is each expert's matrix by itself, in the test's own words.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_merge.cli import exits
from lora_merge.core import view as views
from lora_merge.core.adapter import Delta
from lora_merge.core.tensor import Region
from lora_merge.core.view import View
from lora_merge.deltas import AdditionFacts, DoraFacts, LowRankFacts
from lora_merge.merging.worker import Merger
from lora_merge.runtime.torch_threads import one_torch_thread
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.parity.test_tiles import Memory, written
from tests.steps import dense_merge, step_at

N_EXPERTS, HIDDEN, INNER, RANK, ALPHA = 4, 64, 40, 3, 4.5
LAYERS = (0, 1)
HALVES = {"gate_proj": slice(0, INNER), "up_proj": slice(INNER, 2 * INNER)}


def experts(layer):
    return f"model.layers.{layer}.mlp.experts"


@pytest.fixture(scope="session")
def stacked(workshop):
    """A Qwen3-MoE whose experts are stacked, gate over up, as transformers 5 has them in memory."""
    return building.base(workshop, "qwen3_moe", "float32")


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def write_adapter(root, seed, *, dora=False):
    """Write an adapter of every gate, up and down projection by itself; return its factors by module."""
    root.mkdir()
    tensors, factors = {}, {}
    for layer in LAYERS:
        for expert in range(N_EXPERTS):
            for n, (name, shape) in enumerate(
                {
                    "gate_proj": (INNER, HIDDEN),
                    "up_proj": (INNER, HIDDEN),
                    "down_proj": (HIDDEN, INNER),
                }.items()
            ):
                module = f"{experts(layer)}.{expert}.{name}"
                key = seed + 100 * layer + 10 * expert + n
                a, b = draw(RANK, shape[1], seed=key), draw(shape[0], RANK, seed=key + 5000)
                magnitude = draw(shape[0], seed=key + 9000).abs() + 0.5
                factors[module] = (a, b, magnitude)
                prefix = f"base_model.model.{module}"
                tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
                if dora:
                    tensors[f"{prefix}.lora_magnitude_vector"] = magnitude
    save_file(tensors, root / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_dora": dora, "peft_version": "0.17.0",
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
    }  # fmt: skip
    (root / "adapter_config.json").write_text(json.dumps(config))
    return factors


def read(root):
    """Return every tensor of a checkpoint."""
    found = {}
    for path in sorted(root.glob("*.safetensors")):
        found |= load_file(path)
    return found


def expert_of(tensors, module):
    """Return one expert's matrix, wherever it lies in a stacked checkpoint."""
    path, expert, name = module.rsplit(".", 2)
    if name == "down_proj":
        return tensors[f"{path}.down_proj"][int(expert)]
    return tensors[f"{path}.gate_up_proj"][int(expert), HALVES[name]]


def with_lora(weight, factors):
    a, b, _ = factors
    return weight + (ALPHA / RANK) * (b @ a)


def with_dora(weight, factors):
    v = with_lora(weight, factors)
    return (factors[2] / v.norm(dim=1))[:, None] * v


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_each_expert_of_a_stack_gets_its_own(dora, stacked, merged, tmp_path):
    factors = write_adapter(tmp_path / "adapter", 1, dora=dora)
    before, after = read(stacked), read(merged(stacked, tmp_path / "adapter", "--verify", "full"))
    formula = with_dora if dora else with_lora
    for module, own in factors.items():
        torch.testing.assert_close(expert_of(after, module), formula(expert_of(before, module), own))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items() if ".experts." not in name)


def test_two_adapters_of_single_experts_add_up_by_their_weights(stacked, cli, tmp_path):
    one, two = (write_adapter(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 20_000)))
    out = tmp_path / "merged"
    result = cli(
        "--base", stacked, "--adapter", f"{tmp_path / 'one'}:0.5", "--adapter", f"{tmp_path / 'two'}:-2",
        "--out", out, "--verify", "full",
    )  # fmt: skip
    assert result.exit_code == exits.OK, result.stderr
    before, after = read(stacked), read(out)
    for module, own in one.items():
        weight = expert_of(before, module)
        wanted = (
            weight + 0.5 * (with_lora(weight, own) - weight) - 2 * (with_lora(weight, two[module]) - weight)
        )
        torch.testing.assert_close(expert_of(after, module), wanted)


def test_ties_takes_the_change_of_a_whole_stack(stacked, cli, tmp_path):
    one, two = (write_adapter(tmp_path / name, seed) for name, seed in (("one", 1), ("two", 20_000)))
    out = tmp_path / "merged"
    result = cli(
        "--base", stacked, "--adapter", tmp_path / "one", "--adapter", tmp_path / "two",
        "--out", out, "--combine", "ties", "--density", "1.0",
    )  # fmt: skip
    assert result.exit_code == exits.OK, result.stderr
    before, after = read(stacked), read(out)
    for module, own in one.items():
        weight = expert_of(before, module)
        changes = torch.stack([with_lora(weight, own) - weight, with_lora(weight, two[module]) - weight])
        elected = torch.sign(changes.sum(dim=0))
        agreeing = torch.sign(changes) == elected
        wanted = weight + (changes * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)
        torch.testing.assert_close(expert_of(after, module), wanted)


def test_an_expert_that_the_adapter_lacks_is_named(stacked, cli, tmp_path):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, 1)
    tensors = load_file(adapter / "adapter_model.safetensors")
    lost = f"base_model.model.{experts(1)}.2.up_proj"
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.startswith(lost)},
        adapter / "adapter_model.safetensors",
    )
    result = cli("--base", stacked, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN
    assert f"{experts(1)}.2.up_proj: the config targets it, and the adapter has no tensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_two_experts_in_each_others_place_do_not_pass_verification(stacked, tmp_path, monkeypatch, cli):
    """What verification is there for: the merge itself is made to swap two experts' factors."""
    write_adapter(tmp_path / "adapter", 1)
    honest = Merger._algebra

    def swapping(self, op, delta):
        pairs = {f"{experts(0)}.1.up_proj.weight": 2, f"{experts(0)}.2.up_proj.weight": 1}
        if delta.target in pairs:
            other = f"{experts(0)}.{pairs[delta.target]}.up_proj.weight"
            twin = next(one for one in op.deltas if one.target == other)
            delta = replace(delta, delta=replace(delta.delta, factors=twin.factors))
        return honest(self, op, delta)

    monkeypatch.setattr(Merger, "_algebra", swapping)
    result = cli("--base", stacked, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out")
    assert result.exit_code == exits.VERIFY
    assert f"{experts(0)}.gate_up_proj" in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_expert_missing_on_disk_is_named(workshop, cli, tmp_path):
    """A stack cannot be laid over experts of which one is not there."""
    base = tmp_path / "base"
    building.make("qwen3_moe").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{experts(0)}.2.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    kind = next(kind for kind in KINDS if kind.name.endswith("(target_parameters), two parameters"))
    adapter = building.case(workshop, kind, "qwen3_moe", "float32").adapter
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN
    assert f"{experts(0)}.gate_up_proj" in result.stderr
    assert "its tensors do not fit together" in result.stderr


BLOCKS = {
    "the second of three": ((3, 100, 70), ((1, 2), (0, 100), (0, 70))),
    "the lower half of the last": ((3, 200, 66), ((2, 3), (100, 200), (0, 66))),
    "some columns": ((1, 130, 200), ((0, 1), (0, 130), (72, 200))),
    "the middle of a matrix": ((300, 200), ((70, 230), (64, 190))),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["out_in", "in_out"])
@pytest.mark.parametrize("kind", ["low_rank", "dora"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_part_is_changed_and_nothing_beside_it(block, kind, transposed, tmp_path, monkeypatch):
    monkeypatch.setattr(views, "TILE_ELEMENTS", 1 << 12)
    monkeypatch.setattr(views, "PANEL_ELEMENTS", 1 << 14)
    shape, at = BLOCKS[block]
    rows, columns = (end - start for start, end in at[-2:])
    n_out, n_in = (columns, rows) if transposed else (rows, columns)
    weight = draw(*shape, seed=1)
    # the adapter's weight is larger than the part: five outputs before it, seven inputs after it
    a, b = draw(RANK, n_in + 7, seed=2), draw(n_out + 5, RANK, seed=3)
    magnitude = draw(n_out + 5, seed=4).abs() + 0.5
    part = ((5, n_out + 5), (0, n_in))
    refs = written(tmp_path / "tensors", {"W": weight, "A": a, "B": b, "magnitude": magnitude})
    roles = ("A", "B", "magnitude") if kind == "dora" else ("A", "B")
    facts = DoraFacts() if kind == "dora" else LowRankFacts()
    delta = Delta("W", facts, {role: refs[role] for role in roles}, 1.7)
    spec = delta.placed("W", Region(transposed, at), part=part)
    sink, view = Memory(), View.of(shape, stacked=len(shape) == 3)
    reach = "columns" if kind == "dora" and transposed else "rows"
    with one_torch_thread():
        Merger(sink, "cpu")(step_at(refs["W"], dense_merge(refs["W"], (spec,), view, reach)))
    assert len(view.tiles()) > 1
    result = torch.frombuffer(bytearray(sink.content), dtype=torch.float32).view(shape)
    place = tuple(slice(start, end) for start, end in at)
    own = weight[place].reshape(rows, columns).double()
    v = (own.T if transposed else own) + 1.7 * b[5:].double() @ a[:, :n_in].double()
    if kind == "dora":
        v = (magnitude[5:].double() / v.norm(dim=1))[:, None] * v
    wanted = (v.T if transposed else v).float()
    torch.testing.assert_close(result[place].reshape(rows, columns), wanted)
    beside = torch.ones(shape, dtype=torch.bool)
    beside[place] = False
    assert torch.equal(result[beside], weight[beside])


def test_bfloat16_tiles_beside_a_part_stay_as_they_are(tmp_path, monkeypatch):
    """Compiled code adds products to such tiles where the whole tensor is changed; here most of them meet no change at all."""
    monkeypatch.setattr(views, "TILE_ELEMENTS", 1 << 12)
    weight = draw(4, 128, 64, seed=1).to(torch.bfloat16)
    a, b = draw(RANK, 64, seed=2), draw(128, RANK, seed=3)
    refs = written(tmp_path / "tensors", {"W": weight, "A": a, "B": b})
    delta = Delta("W", LowRankFacts(), {"A": refs["A"], "B": refs["B"]}, 1.7)
    spec = delta.placed("W", Region(box=((2, 3), (0, 128), (0, 64))))
    sink, view = Memory(), View.of((4, 128, 64), stacked=True)
    with one_torch_thread():
        Merger(sink, "cpu")(step_at(refs["W"], dense_merge(refs["W"], (spec,), view)))
    assert len(view.tiles()) >= 4
    result = torch.frombuffer(bytearray(sink.content), dtype=torch.bfloat16).view(weight.shape)
    wanted = (weight[2].float() + (b @ a) * 1.7).to(torch.bfloat16)
    torch.testing.assert_close(result[2], wanted)
    assert torch.equal(result[[0, 1, 3]], weight[[0, 1, 3]])


def test_a_part_of_a_bias_is_changed_and_nothing_beside_it(tmp_path):
    weight, addend = draw(90, seed=1), draw(30, seed=2)
    refs = written(tmp_path / "tensors", {"W": weight, "addend": addend})
    delta = Delta("W", AdditionFacts(), {"addend": refs["addend"]}, 2.0)
    spec = delta.placed("W", Region(box=((30, 50),)), part=((10, 30),))
    sink = Memory()
    with one_torch_thread():
        Merger(sink, "cpu")(step_at(refs["W"], dense_merge(refs["W"], (spec,), View.of((90,)))))
    result = torch.frombuffer(bytearray(sink.content), dtype=torch.float32)
    weight[30:50] += 2 * addend[10:]
    torch.testing.assert_close(result, weight)


def test_the_adapter_of_single_experts_is_the_same_on_either_layout(stacked, merged, cli, tmp_path):
    """On a base as published each expert is a tensor; what comes of it is what comes of the stack."""
    write_adapter(tmp_path / "adapter", 1)
    one_by_one = tmp_path / "one-by-one"
    building.make("qwen3_moe").save_pretrained(one_by_one)
    by_stack = read(merged(stacked, tmp_path / "adapter"))
    out = tmp_path / "of-one-by-one"
    assert cli("--base", one_by_one, "--adapter", tmp_path / "adapter", "--out", out).exit_code == exits.OK
    with safe_open(out / "model.safetensors", "pt") as file:
        modules = [name.removesuffix(".weight") for name in file.keys() if ".experts." in name]  # noqa: SIM118
        assert len(modules) == 2 * N_EXPERTS * 3
        for module in modules:
            assert torch.equal(file.get_tensor(f"{module}.weight"), expert_of(by_stack, module))
    shutil.rmtree(out)
