"""Experts whose matrices are square: which way round they lie, shapes cannot say, and neither can the name.

The oracle is the model with ``W + s·B·A`` of every expert, or, for a base that stores experts the other way round,
the stored tensor with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity import family_building as building

if TYPE_CHECKING:
    from tests.parity.families import Family

FLOAT32_TOLERANCE = 3e-5
LEAST_EFFECT = 0.05
RANK, N_EXPERTS = 3, 4
SQUARE = {"intermediate_size": 32}
OPTION = "--expert-layout"


def square(name: str) -> Family:
    """Return a family whose gate and up matrices together are as high as the model is wide."""
    family = building.by_name(name)
    fields = dict(family.fields)
    if "text_config" in fields:
        fields["text_config"] = {**fields["text_config"], "moe_intermediate_size": 32}
    else:
        fields.update(SQUARE)
    return dataclasses.replace(family, fields=fields)


class Square:
    """A base with square experts, and an adapter of its ``gate_up_proj``."""

    def __init__(self, name: str, root, *, peft_version: str | None, across: bool = False):
        self.family = square(name)
        self.model = building.make(self.family)
        self.found = building.published(self.model, save_original_format=False)
        self.names = sorted(n for n in self.found if n.endswith("experts.gate_up_proj"))
        assert {tuple(self.found[n].shape) for n in self.names} == {(N_EXPERTS, 64, 64)}
        if across:
            self.found |= {
                n: t.transpose(1, 2).contiguous()
                for n, t in self.found.items()
                if re.search(r"experts\.\w+$", n)
            }
        self.base = building.write(root / "base", self.model, self.found)
        self.adapter = root / "adapter"
        self.adapter.mkdir()
        generator = torch.Generator().manual_seed(23)
        self.a = {n: torch.randn(N_EXPERTS * RANK, 64, generator=generator) * 0.1 for n in self.names}
        self.b = {n: torch.randn(64, N_EXPERTS * RANK, generator=generator) * 0.1 for n in self.names}
        self.write_factors(self.b)
        building.write_config(
            self.adapter, r=RANK, lora_alpha=6, target_modules=[], target_parameters=["experts.gate_up_proj"]
        )
        path = self.adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        config.pop("peft_version", None)
        path.write_text(json.dumps(config | ({"peft_version": peft_version} if peft_version else {})))

    def configure(self, **fields) -> None:
        """Set fields of the adapter's configuration."""
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def pack_by_expert(self) -> None:
        """Order the columns of B expert by expert, as Unsloth trained until September 2026."""
        columns = [k * N_EXPERTS + e for e in range(N_EXPERTS) for k in range(RANK)]
        self.write_factors({name: b[:, columns].contiguous() for name, b in self.b.items()})

    def write_factors(self, b) -> None:
        factors = {}
        for name in self.names:
            module = f"base_model.model.{name.removesuffix('.gate_up_proj')}"
            factors[f"{module}.lora_A.weight"] = self.a[name]
            factors[f"{module}.lora_B.weight"] = b[name]
        save_file(factors, self.adapter / "adapter_model.safetensors", {"format": "pt"})

    def change(self, name):
        """Return 6/3·B·A of every expert, [experts, out, in]."""
        return 2.0 * building.stacked_product(self.a[name], self.b[name], N_EXPERTS)

    def wanted(self):
        """Return what the model computes whose experts got B·A, out × in."""
        state = self.model.state_dict()
        state = {n: t + self.change(n) if n in self.names else t for n, t in state.items()}
        model = building.make(self.family)
        model.load_state_dict(state)
        return building.compute(model, self.family)


def off_by(got, wanted):
    return float((got - wanted).abs().max() / wanted.abs().max())


NAMES = ("OLMoE", "Qwen3-VL-MoE")


@pytest.mark.parametrize("name", NAMES)
def test_square_experts_of_an_unknown_peft_are_refused_by_name(name, tmp_path, cli):
    case = Square(name, tmp_path, peft_version=None)
    result = cli("--base", case.base, "--adapter", case.adapter, "--out", tmp_path / "out")
    assert result.exit_code == 4, result.output
    assert "gate_up_proj" in result.output
    assert OPTION in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_on_experts_that_are_stored_out_by_in_merges_right_when_the_user_says_so(
    name, tmp_path, merged
):
    case = Square(name, tmp_path, peft_version=None)
    plain, wanted = building.compute(case.model, case.family), case.wanted()
    assert off_by(plain, wanted) > LEAST_EFFECT
    out = merged(case.base, case.adapter, OPTION, "out-in")
    assert off_by(building.compute(building.load(out, case.family), case.family), wanted) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_experts_that_are_stored_in_by_out_get_the_change_the_other_way_round(name, tmp_path, merged):
    # Such a base is read by an engine that expects it so; in transformers it would be another model.
    case = Square(name, tmp_path, peft_version=None, across=True)
    after = load_file(merged(case.base, case.adapter, OPTION, "in-out") / "model.safetensors")
    assert sorted(after) == sorted(case.found)
    for tensor_name, before in case.found.items():
        if tensor_name in case.names:
            wanted = before + case.change(tensor_name).transpose(1, 2)
            assert off_by(before, wanted) > LEAST_EFFECT
            assert off_by(after[tensor_name], wanted) <= FLOAT32_TOLERANCE
        else:
            assert torch.equal(after[tensor_name], before)


@pytest.mark.parametrize("packing", ["peft", "unsloth", "grouped_by_expert", "rank_major"])
def test_factors_packed_expert_by_expert_give_what_the_same_factors_give_as_peft_packs_them(
    packing, tmp_path, merged
):
    # unslothai/unsloth#6930: B has an expert's columns side by side, e·r + k; PEFT has them apart, k·E + e.
    case = Square("OLMoE", tmp_path, peft_version=None)
    options = [OPTION, "out-in"]
    if packing in {"unsloth", "grouped_by_expert"}:
        case.pack_by_expert()
    if packing == "unsloth":
        options += [OPTION, "unsloth"]
    elif packing != "peft":
        case.configure(lora_B_layout=packing)  # unsloth_zoo since September 2026
    out = merged(case.base, case.adapter, *options)
    got = building.compute(building.load(out, case.family), case.family)
    assert off_by(got, case.wanted()) <= FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("fields", "options", "exit_code", "words"),
    [
        ({"auto_mapping": {"unsloth_fixed": True}}, (), 0, "warning: lora_B_layout: is not there"),
        ({"base_model_name_or_path": "unsloth/OLMoE"}, (), 0, "hint: if an earlier release trained it, pass"),
        ({"auto_mapping": {"unsloth_fixed": True}}, (OPTION, "unsloth"), 0, ""),
        (
            {"lora_B_layout": "expert_major"},
            (),
            4,
            "lora_B_layout: is 'expert_major', expected 'rank_major' or",
        ),
        (
            {"lora_B_layout": "rank_major"},
            (OPTION, "unsloth"),
            4,
            "lora_B_layout: is 'rank_major', and --expert",
        ),
    ],
)
def test_doubts_about_the_packing_of_experts_are_said(fields, options, exit_code, words, tmp_path, cli):
    case = Square("OLMoE", tmp_path, peft_version="0.21.2")
    case.configure(**fields)
    result = cli("plan", "--base", case.base, "--adapter", case.adapter, *options)
    assert result.exit_code == exit_code, result.output
    assert words in result.stderr
    assert bool(words) == ("lora_B_layout" in result.stderr)


def test_the_oracle_is_what_peft_computes(tmp_path):
    # PEFT 0.21 applies B·A out × in; its own forward pass vouches for the factors and their packing.
    import peft

    case = Square("OLMoE", tmp_path, peft_version=peft.__version__)
    unmerged = peft.PeftModel.from_pretrained(building.load(case.base, case.family), case.adapter)
    assert off_by(building.compute(unmerged, case.family), case.wanted()) <= FLOAT32_TOLERANCE


def test_the_version_of_peft_tells_how_square_experts_lie(tmp_path, merged):
    import peft

    case = Square("OLMoE", tmp_path, peft_version=peft.__version__)
    out = merged(case.base, case.adapter)
    got = building.compute(building.load(out, case.family), case.family)
    assert off_by(got, case.wanted()) <= FLOAT32_TOLERANCE
