"""``verify --forward``: it passes what is right, of every family and every kind, and finds what is wrong."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

import lora_merge
from tests.conformance.test_checks import OPTIONS
from tests.crossing import one_for_each, only
from tests.parity import building as kinds_building
from tests.parity import family_building as building
from tests.parity.kinds import KINDS
from tests.parity.test_families import matrix, slug
from tests.tampering import edit_json, edit_tensors

if TYPE_CHECKING:
    from pathlib import Path

# PEFT has no module of these names: what it is compared with is the merge before it was rounded.
UNROUNDED = {"Mixtral", "Qwen2-MoE", "Qwen3-MoE", "DeepSeek-V3", "GLM-4-MoE", "Granite-MoE", "OLMoE"} | {
    "Phi-3.5-MoE", "Jamba", "ERNIE 4.5 MoE", "DINOv2",
}  # fmt: skip

OF_THEIR_OWN = {"Mistral", "Falcon-H1"}
"""Families whose targets, or whose configuration, take branches that others of their structure do not."""


@pytest.fixture(autouse=True)
def one_thread():
    """The products are tiny: handing them to threads takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def finding(proof, check):
    """Return what one check found."""
    return next(found for found in proof.findings if found.check == check)


OTHER_INPUTS = ("wav2vec2", "siglip", "videomae")
"""Models of `KINDS` that are given sounds, pictures and films, not texts."""


@pytest.mark.parametrize(
    ("family", "naming", "layout"),
    one_for_each(
        matrix(),
        lambda _, naming, __: naming,
        lambda family, *_: family.inputs,
        lambda family, *_: family.name in OF_THEIR_OWN and family.name,
    ),
)
def test_what_is_merged_right_passes_of_every_family(family, naming, layout, workshop, merged):
    base, trained = (
        building.base(workshop, family.name, layout),
        building.trained(workshop, family.name, naming),
    )
    out = merged(base, trained.adapter)
    proof = lora_merge.verify(out, forward=True)
    assert proof.ok, [str(issue) for issue in proof.issues]
    assert [found.state for found in proof.findings if found.state != "passed"] == []
    assert proof.comparisons
    unrounded = naming == "transformers 4" and family.name in UNROUNDED
    assert finding(proof, "forward").detail.endswith("before rounding" if unrounded else "PEFT, unmerged")


@pytest.mark.parametrize(
    ("kind", "model", "dtype"),
    one_for_each(
        [
            pytest.param(kind, model, dtype, id=f"{slug(kind.name)}-{model}-{dtype}")
            for kind in KINDS
            for model in kind.models
            for dtype in ["bfloat16" if "bfloat16" in kind.dtypes and model == kind.models[0] else "float32"]
        ],
        lambda kind, *_: (kind.group, kind.options),
        lambda _, model, __: model in OTHER_INPUTS and model,
    ),
)
def test_what_is_merged_right_passes_of_every_kind(kind, model, dtype, workshop, tmp_path):
    if kind.needs:
        pytest.importorskip(kind.needs)
    case = kinds_building.case(workshop, kind, model, dtype)
    lora_merge.merge(base=case.base, adapter=case.adapter, out=tmp_path / "out", **OPTIONS[kind.options])
    proof = lora_merge.verify(tmp_path / "out", forward=True)
    assert proof.ok, [str(issue) for issue in proof.issues]
    assert finding(proof, "forward").state == "passed"


# Planted corruptions. The tensors are those of a float32 base, so rounding explains next to nothing; each changes
# what the model computes by about as much as the adapter does, or by as much as a coarser dtype would.


class Bench:
    """A merge, and the tensors that it was made of.

    Args:
        out: the output; it may be broken.
        base: the base's tensors.
        adapter: the adapter's directory.
    """

    def __init__(self, out: Path, base: Path, adapter: Path) -> None:
        self.out = out
        self.base = load_file(base / "model.safetensors")
        self.adapter = load_file(adapter / "adapter_model.safetensors")

    def edit(self, change) -> None:
        """Let a function change the output's tensors."""
        edit_tensors(self.out / "model.safetensors", change)

    def factors(self, module):
        """Return A and B of a module."""
        stem = f"base_model.model.{module}"
        return self.adapter[f"{stem}.lora_A.weight"], self.adapter[f"{stem}.lora_B.weight"]


def set_to(name, value):
    """Return a corruption that gives a tensor another value, made of the bench."""

    def corrupt(bench):
        bench.edit(lambda tensors: tensors.__setitem__(name, value(bench, tensors).contiguous().clone()))

    return corrupt


def swap(one, other):
    """Return a corruption that exchanges two tensors."""

    def corrupt(bench):
        def exchange(tensors):
            tensors[one], tensors[other] = tensors[other].clone(), tensors[one].clone()

        bench.edit(exchange)

    return corrupt


def stale(name):
    """Return a corruption that leaves a tensor as it is in the base."""
    return set_to(name, lambda bench, tensors: bench.base[name])


def without_last_rank(bench, tensors):
    """Return a merged query projection that lacks the last of the adapter's ranks."""
    a, b = bench.factors("model.layers.0.self_attn.q_proj")
    return tensors["model.layers.0.self_attn.q_proj.weight"] - 6 / 4 * torch.outer(b[:, -1], a[-1])


def one_element(tensors):
    """Change one value of a norm that the adapter does not touch."""
    tensors["model.norm.weight"][3] += 0.01


Q0, Q1 = (f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1))
GATE = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
DOWN = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
UP = "model.layers.0.block_sparse_moe.experts.{}.w3.weight"
TOWER = "visual.blocks.0.attn.qkv.weight"

CORRUPTIONS = {
    "a delta has twice its scale": ("Mixtral", set_to(Q0, lambda bench, t: 2 * t[Q0] - bench.base[Q0])),
    "a delta has rsLoRA's scale": ("Mixtral", set_to(Q1, lambda bench, t: bench.base[Q1] + 2 * (t[Q1] - bench.base[Q1]))),
    "a delta is subtracted": ("Mixtral", set_to(Q0, lambda bench, t: 2 * bench.base[Q0] - t[Q0])),
    "a delta lacks its last rank": ("Mixtral", set_to(Q0, without_last_rank)),
    "a module is not merged": ("Mixtral", stale("model.layers.1.self_attn.v_proj.weight")),
    "two experts are swapped": ("Mixtral", swap(DOWN.format(0), DOWN.format(1))),
    "one expert of four is not merged": ("Mixtral", stale(DOWN.format(2))),
    "gate and up of an expert are swapped": ("Mixtral", swap(GATE.format(1), UP.format(1))),
    "two layers are swapped": ("Mixtral", swap(Q0, Q1)),
    "an untouched norm has one other value": ("Mixtral", lambda bench: bench.edit(one_element)),
    "a merged tensor was rounded to bfloat16": ("Mixtral", set_to(Q0, lambda bench, t: t[Q0].bfloat16().float())),
    "the config has another theta": (
        "Mixtral",
        lambda bench: edit_json(bench.out / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
    ),
    "a tensor is missing": ("Mixtral", lambda bench: bench.edit(lambda t: t.pop(DOWN.format(3)) is None)),
    "the head is not merged": ("Qwen3-MoE", stale("lm_head.weight")),
    "a module that no prompt reaches is not merged": ("Qwen2-VL", stale(TOWER)),
}  # fmt: skip


SAMPLE = (
    "a delta has twice its scale",
    "one expert of four is not merged",
    "a merged tensor was rounded to bfloat16",
    "the config has another theta",
    "a tensor is missing",
    "the head is not merged",
    "a module that no prompt reaches is not merged",
)


@pytest.mark.parametrize("what", only(SAMPLE, CORRUPTIONS))
def test_a_corruption_is_found_by_forward_passes(what, workshop, cli, tmp_path):
    family, corrupt = CORRUPTIONS[what]
    base, trained = (
        building.base(workshop, family, "published"),
        building.trained(workshop, family, "transformers 5"),
    )
    out = tmp_path / "out"
    assert cli("--base", base, "--adapter", trained.adapter, "--out", out).exit_code == 0
    corrupt(Bench(out, base, trained.adapter))
    result = cli("verify", out, "--forward", "--json")
    assert result.exit_code == 6, result.output
    found = {one["check"]: one for one in json.loads(result.stdout)["findings"]}
    assert found["forward"]["state"] == "failed"
    assert any(issue["code"] == "forward" for issue in found["forward"]["issues"])


def test_a_stale_row_of_the_embedding_is_found(pico, pico_adapter, cli, tmp_path):
    # No text of ours has these tokens, but what the adapter trained is asked for.
    base = pico("llama", "float32")
    adapter = pico_adapter(base, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [7, 90]})
    edited = tmp_path / "adapter"
    edited.mkdir()
    for path in adapter.iterdir():
        (edited / path.name).write_bytes(path.read_bytes())
    edit_tensors(
        edited / "adapter_model.safetensors",
        lambda t: t.update({n: x + 0.5 for n, x in t.items() if "trainable_tokens_delta" in n}),
    )
    out = tmp_path / "out"
    assert cli("--base", base, "--adapter", edited, "--out", out).exit_code == 0
    assert lora_merge.verify(out, forward=True).ok
    row = load_file(base / "model.safetensors")["model.embed_tokens.weight"][90]
    edit_tensors(out / "model.safetensors", lambda t: t["model.embed_tokens.weight"][90].copy_(row))
    proof = lora_merge.verify(out, forward=True)
    wrong = {one.prompt for one in proof.comparisons if not one.ok}
    assert "trained tokens" in wrong
    assert finding(proof, "forward").state == "failed"


def test_a_wrong_scale_is_found_in_a_bfloat16_checkpoint(pico, pico_adapter, cli, tmp_path):
    # Rounding explains far more here; a delta of twice its scale is still another model.
    base = pico("llama", "bfloat16")
    adapter = pico_adapter(base, target_modules="all-linear")
    out = tmp_path / "out"
    assert cli("--base", base, "--adapter", adapter, "--out", out).exit_code == 0
    before = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    edit_tensors(out / "model.safetensors", lambda t: t.update({name: 2 * t[name] - before[name]}))
    proof = lora_merge.verify(out, forward=True)
    assert finding(proof, "forward").state == "failed"
    assert {one.ok for one in proof.comparisons} == {False}


def test_the_users_tolerance_decides(pico, pico_adapter, merged):
    base = pico("llama", "bfloat16")
    out = merged(base, pico_adapter(base))
    measured = max(one.max_difference for one in lora_merge.verify(out, forward=True).comparisons)
    assert measured > 0
    assert lora_merge.verify(out, forward=True, tolerance=2 * measured).ok
    assert not lora_merge.verify(out, forward=True, tolerance=measured / 2).ok


def test_the_users_texts_are_asked(pico, pico_adapter, merged):
    base = pico("llama", "float32")
    proof = lora_merge.verify(
        merged(base, pico_adapter(base)), forward=True, prompt=["w1 w2 w3", "w9"], n_tokens=3
    )
    assert [one.prompt for one in proof.comparisons] == ["text 1", "text 2", "random tokens"]
    assert {one.n_tokens for one in proof.comparisons} == {3}


def test_several_adapters_are_compared_with_what_was_merged_before_rounding(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16")
    adapters = [f"{pico_adapter(base)}:0.5", pico_adapter(base, target_modules=["v_proj"], r=2)]
    lora_merge.merge(base=base, adapter=adapters, out=tmp_path / "out", combine="ties")
    proof = lora_merge.verify(tmp_path / "out", forward=True)
    assert proof.ok
    assert "several adapters" in "".join(map(str, proof.issues))
    name = "model.layers.1.self_attn.v_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    edit_tensors(tmp_path / "out" / "model.safetensors", lambda t: t.update({name: before.clone()}))
    assert finding(lora_merge.verify(tmp_path / "out", forward=True), "forward").state == "failed"


@pytest.mark.parametrize("family", ["Whisper", "T5", "Llama"])
def test_a_prompt_reaches_the_model_wherever_it_takes_tokens(family, workshop):
    from lora_merge.verification.engines.hf import scores
    from lora_merge.verification.forward_comparison import Prompt

    model = building.load(building.base(workshop, family, "published"), building.by_name(family))
    one, other = (scores(model, Prompt("", ids), ())[-1] for ids in ((5, 9, 11), (5, 9, 12)))
    assert abs(one - other).max() > 0.01


# Models whose answers are not a function of what they are asked. The class is a real one with a forward pass that adds
# to the logits what it draws, or what it keeps from call to call.


@pytest.fixture
def unsteady(monkeypatch):
    """Return a function that has every Llama add something to its logits: (logits, calls so far) → what is added."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM.forward

    def install(added):
        calls = []

        def forward(self, *args, **kwargs):
            output = plain(self, *args, **kwargs)
            calls.append(None)
            output.logits = output.logits + added(output.logits, len(calls))
            return output

        monkeypatch.setattr(LlamaForCausalLM, "forward", forward)

    return install


DRAWN = {
    "noise": lambda logits, _: torch.randn_like(logits),
    "dropout in evaluation": lambda logits, _: torch.nn.functional.dropout(logits, 0.3, training=True),
    "a gate": lambda logits, _: torch.rand(()).expand_as(logits),
}


@pytest.mark.parametrize("what", only(["noise"], DRAWN))
def test_models_that_draw_at_random_draw_the_same_numbers(what, unsteady, pico, pico_adapter, merged):
    base = pico("llama", "float32")
    out = merged(base, pico_adapter(base))
    unsteady(DRAWN[what])
    proof = lora_merge.verify(out, forward=True)
    assert proof.ok, [str(issue) for issue in proof.issues]
    assert "random" in {issue.code for issue in proof.issues}
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    edit_tensors(out / "model.safetensors", lambda t: t.update({name: before.clone()}))
    assert finding(lora_merge.verify(out, forward=True), "forward").state == "failed"


KEPT = {
    "a state": lambda logits, n_calls: torch.full_like(logits, 0.1 * n_calls),
    "what another generator drew": lambda logits, _: torch.tensor(random.SystemRandom().random()),
    "a value that is none": lambda logits, n_calls: torch.full_like(logits, torch.nan if n_calls > 9 else 0),
}


@pytest.mark.parametrize("what", KEPT)
def test_a_model_that_answers_otherwise_each_time_does_not_pass(
    what, unsteady, pico, pico_adapter, merged, cli
):
    base = pico("llama", "float32")
    out = merged(base, pico_adapter(base))
    unsteady(KEPT[what])
    result = cli("verify", out, "--forward", "--json")
    assert result.exit_code == 6, result.output
    found = next(one for one in json.loads(result.stdout)["findings"] if one["check"] == "forward")
    assert [issue["code"] for issue in found["issues"]] == ["not-comparable"]
    assert "with the same seed differ by" in found["issues"][0]["sentence"]


def test_a_model_without_chance_is_not_said_to_have_it(pico, pico_adapter, merged):
    base = pico("llama", "float32")
    proof = lora_merge.verify(merged(base, pico_adapter(base)), forward=True)
    assert {issue.code for issue in proof.issues}.isdisjoint({"random", "not-comparable"})
