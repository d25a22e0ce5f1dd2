"""Verbs on bases in storages that only tests know, each compared with the same values stored plain."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.core.plan import Merge, MergePlan
from lora_merge.core.tensor import shape_text
from tests.tampering import edit_json, edit_tensors
from tests.toys.codecs import ALL, known, stored_as, values_in

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
each = pytest.mark.parametrize("storage", ALL)


def ok(result):
    assert result.exit_code == exits.OK, result.stdout + result.stderr
    return result


@pytest.fixture
def bases(pico, tmp_path):
    """Return a function: storage, family → a base whose linear layers are stored so, and one with the same values, plain."""

    def build(storage, family="qwen2"):
        coded, plain = tmp_path / "coded", tmp_path / "plain"
        for root in (coded, plain):
            shutil.copytree(pico(family, "float32"), root)
        tensors = load_file(plain / "model.safetensors")
        generator = torch.Generator().manual_seed(4)
        for name in [name for name in tensors if name.endswith("proj.bias")]:
            tensors[name] = torch.randn(tensors[name].shape, generator=generator)
        parts = {}
        for name in [name for name in tensors if name.endswith(tuple(f"{one}.weight" for one in LINEAR))]:
            parts |= stored_as(storage, name, tensors.pop(name))
        for name in [name for name in parts if name.endswith(".weight")]:
            tensors[name] = values_in(storage, name, parts)
        save_file(tensors, plain / "model.safetensors", {"format": "pt"})
        save_file({**tensors, **parts}, coded / "model.safetensors", {"format": "pt"})
        return coded, plain

    return build


@pytest.fixture
def peft_adapter(tmp_path):
    """Return a function: plain base, config of PEFT → an adapter of random values."""

    def build(base, config):
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return build


def config_of(kind):
    import peft

    targets = {"target_modules": ["q_proj", "down_proj"]}
    return {
        "LoHa": lambda: peft.LoHaConfig(r=2, **targets),
        "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **targets),
        "OFT": lambda: peft.OFTConfig(oft_block_size=8, r=0, **targets),
        "GLoRA": lambda: peft.GloraConfig(r=2, **targets),
        "RoAd": lambda: peft.RoadConfig(group_size=8, **targets),
    }[kind]()


@each
@pytest.mark.parametrize("kind", ["LoHa", "IA3", "OFT", "GLoRA", "RoAd"])
def test_what_pefts_layers_merge_does_not_depend_on_how_the_base_is_stored(
    kind, storage, bases, peft_adapter, cli, tmp_path, monkeypatch
):
    """The layers of q_proj have a bias, which some of them change with the weight at hand."""
    monkeypatch.setattr("lora_merge.merging.peak.TILE_ELEMENTS", 1 << 10)
    coded, plain = bases(storage)
    adapter = peft_adapter(plain, config_of(kind))
    arguments = ("--adapter", adapter, "--dtype", "float32", "--verify", "full")
    with known(storage):
        result = ok(
            cli("--base", coded, *arguments, "--out-storage", "dense", "--out", tmp_path / "of-coded")
        )
        # Those checks of modules that are made at all pass too.
        assert "not compared" not in result.stderr
    ok(cli("--base", plain, *arguments, "--out", tmp_path / "of-plain"))
    one, other = (load_file(tmp_path / f"of-{base}" / "model.safetensors") for base in ("coded", "plain"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    before = load_file(plain / "model.safetensors")
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], one[name])}
    assert changed == ({"weight", "bias"} if kind in {"IA3", "GLoRA", "RoAd"} else {"weight"})


def test_a_plan_with_pefts_layers_on_coded_weights_survives_json(bases, peft_adapter):
    coded, plain = bases("nibbles")
    adapter = peft_adapter(plain, config_of("GLoRA"))
    with known("nibbles"):
        plan = lora_merge.plan(base=coded, adapter=adapter)
    assert MergePlan.from_json(plan.to_json()) == plan
    (bias,) = [
        delta
        for step in plan.steps
        if step.name == "model.layers.0.self_attn.q_proj.bias" and isinstance(step.op, Merge)
        for delta in step.op.deltas
    ]
    ((name, shape, storage),) = bias.facts.coded
    assert (name, shape, storage.codec) == ("weight", (64, 64), "nibbles")


def test_pefts_layers_on_what_is_not_decoded_a_second_time_are_not_compared(
    bases, peft_adapter, cli, tmp_path
):
    coded, plain = bases("nibbles")
    arguments = (
        "--base",
        coded,
        "--adapter",
        peft_adapter(plain, config_of("LoHa")),
        "--out",
        tmp_path / "out",
    )
    with known("nibbles", recomputed=False):
        result = ok(cli(*arguments))
    assert "no second decoder" in result.stderr


@each
def test_an_extraction_does_not_depend_on_how_the_base_is_stored(storage, bases, cli, tmp_path):
    coded, plain = bases(storage)
    shutil.copytree(plain, tmp_path / "tuned")

    def train(tensors):
        generator = torch.Generator().manual_seed(1)
        for name in (name for name in tensors if name.endswith(("q_proj.weight", "up_proj.weight"))):
            tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)

    edit_tensors(tmp_path / "tuned" / "model.safetensors", train)
    for base in (coded, plain):
        with known(storage):
            ok(
                cli(
                    "extract",
                    "--base",
                    base,
                    "--tuned",
                    tmp_path / "tuned",
                    "--rank",
                    5,
                    "--out",
                    tmp_path / f"of-{base.name}",
                )
            )
    one, other = (
        load_file(tmp_path / f"of-{base}" / "adapter_model.safetensors") for base in ("coded", "plain")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    # And the other way round: from the training back to the base.
    with known(storage):
        ok(
            cli(
                "extract",
                "--base",
                tmp_path / "tuned",
                "--tuned",
                coded,
                "--rank",
                5,
                "--out",
                tmp_path / "back",
            )
        )
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    for name in (name for name in one if name.endswith("lora_A.weight")):
        partner = name.replace("lora_A", "lora_B")
        assert torch.allclose(back[partner] @ back[name], -(one[partner] @ one[name]), atol=1e-5)


@each
def test_a_shape_that_differs_is_told_by_that_of_the_weight(storage, bases, cli, tmp_path):
    coded, plain = bases(storage)
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(plain / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(96, 32)}))
    with known(storage):
        result = cli("extract", "--base", coded, "--tuned", plain, "--rank", 5, "--out", tmp_path / "out")
    assert result.exit_code == exits.PLAN
    shape = values_in(storage, name, load_file(coded / "model.safetensors")).shape
    assert (
        f"{name}: has the shape {shape_text((96, 32))}, expected {shape_text(tuple(shape))} as in the base"
        in result.stderr
    )


@each
def test_a_norm_of_many_parts_takes_one_pass(storage, bases, monkeypatch):
    """However many modules have a part of one weight, each of its rows is decoded once."""
    from lora_merge.codecs import CODECS
    from lora_merge.formats.weights import weight_norms
    from lora_merge.planning.resolve import resolve_base

    monkeypatch.setattr("lora_merge.formats.weights._BLOCK_ELEMENTS", 1 << 8)
    monkeypatch.setattr("lora_merge.core.view.MIN_TILE_ROWS", 6)
    coded, plain = bases(storage)
    name = "model.layers.0.mlp.up_proj.weight"
    values = load_file(plain / "model.safetensors")[name].double()
    n_out, n_in = values.shape
    boxes = [((0, 10), (0, n_in)), ((10, n_out), (0, n_in)), ((5, 7), (3, 9)), ()]
    decoded = []
    with known(storage):
        weight = resolve_base(coded).weights[name]
        plainly = CODECS[storage].decode
        monkeypatch.setattr(
            type(CODECS[storage]),
            "decode",
            lambda self, tile, *rest: (decoded.append((tile.start, tile.end)), plainly(tile, *rest)),
        )
        norms = weight_norms(weight, boxes)
    parts = (values[:10], values[10:], values[5:7, 3:9], values)
    assert norms == pytest.approx([float(part.norm()) for part in parts], rel=1e-5)
    assert len(decoded) > 3
    assert sum(end - start for start, end in decoded) == n_out


def test_the_configuration_of_the_base_is_no_matter_for_pefts_layers(bases, peft_adapter, cli, tmp_path):
    """PEFT would choose its layers for quantised weights by it."""
    coded, plain = bases("nibbles")
    adapter = peft_adapter(plain, config_of("OFT"))
    edit_json(coded / "config.json", quantization_config={})
    with known("nibbles"):
        plan = lora_merge.plan(base=coded, adapter=adapter)
    facts = [d.facts for step in plan.steps if isinstance(step.op, Merge) for d in step.op.deltas]
    assert facts
    assert all("quantization_config" not in json.loads(one.model_config) for one in facts)
