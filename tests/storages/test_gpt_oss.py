"""``--quantize mxfp4`` of gpt-oss: its experts as they are published, byte by byte, loaded, verified, and with the adapter."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.checks import CHECKS
from lora_merge.cli import exits
from lora_merge.codecs import ENCODERS
from lora_merge.codecs.in_memory import decoded as decode
from lora_merge.core.plan import Merge
from lora_merge.core.weight import Tile
from lora_merge.quantised.schemes import OF_GPT_OSS
from tests.filling import fill, fill_all
from tests.rounding import evidence_of
from tests.storages.reference import (
    FIXTURES,
    STACKS,
    adapted,
    decoded,
    logits_of,
    model_of,
    plain_config,
    same_bytes,
    tensors_of,
)
from tests.tampering import edit_tensors

PUBLISHED = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""``quantization_config`` of openai/gpt-oss-20b."""

FIXTURE = FIXTURES / "gptoss-mxfp4"
STORAGE = OF_GPT_OSS["mxfp4"].storage
FEW = {"hidden_size": 256, "intermediate_size": 128}
MIXED = {"target_modules": ["q_proj", "o_proj"], "target_parameters": list(STACKS)}


def published(weight):
    """Return blocks and scales of ``[E, in, out]`` by triton_kernels' rule, written out in float64 with a table of levels."""
    groups = weight.bfloat16().double().transpose(1, 2).unflatten(-1, (-1, 32)).numpy()
    # The smallest power of two that is not below the largest value / 6, a float32 that is normal or zero.
    mantissa, exponent = np.frexp((np.abs(groups).max(-1).astype(np.float32) / np.float32(6)).astype(float))
    biased = np.where(mantissa == 0, 0, np.maximum(exponent - (mantissa == 0.5) + 127, 1))
    numbers = groups / np.exp2(biased[..., None] - 127.0)
    levels = np.array([6.0, 4.0, 3.0, 2.0, 1.5, 1.0, 0.5, 0.0])  # of two as near, the first is found
    codes = 7 - np.abs(np.abs(numbers)[..., None] - levels).argmin(-1)
    codes = codes + 8 * np.signbit(numbers)
    blocks = (codes[..., 0::2] + 16 * codes[..., 1::2]).astype(np.uint8)
    return torch.from_numpy(blocks), torch.from_numpy(biased.astype(np.uint8))


def ours(weight, rows=None):
    """Return blocks and scales of ``[E, in, out]``, made in tiles of some rows of an expert each."""
    experts, n_in, n_out = shape = tuple(weight.shape)
    blocks, scales = (
        torch.full((experts, n_out, n_in // 32, *more), 77, dtype=torch.uint8) for more in ((16,), ())
    )
    wide = weight.float().view(-1, n_out)
    size = rows or n_in * experts
    for start in range(0, n_in * experts, size):
        tile = Tile(shape, n_in * experts, start, start + size)
        first, last = start // n_in, (start + size - 1) // n_in + 1
        parts = {"weight": blocks[first:last], "scale": scales[first:last]}
        ranges = ENCODERS[STORAGE.codec].ranges(tile, STORAGE)
        out = {role: parts[role].view(one.shape) for role, one in ranges.items()}
        values = wide[start : start + size].clone()
        grid = ENCODERS[STORAGE.codec].grid(tile, values, out, STORAGE, None, None)
        levels = grid.nearest(values)
        assert torch.equal(values.view(torch.int32), wide[start : start + size].view(torch.int32))
        grid.keep(levels)
    return blocks, scales


def drawn(kind):
    torch.manual_seed(2)
    wide = torch.randn(3, 128, 48)
    return {
        "weights": wide * 0.03 * torch.exp(torch.randn(3, 1, 48)),
        "ties": torch.randint(-24, 25, (3, 128, 48)) / 4 * 2.0**-7,
        "huge": wide * 5e37,
        "tiny": wide * 1e-39,
        "zeros": torch.where(torch.arange(128)[None, :, None] % 64 < 40, torch.tensor(-0.0), wide),
    }[kind].bfloat16()


@pytest.mark.parametrize("kind", ["weights", "ties", "huge", "tiny", "zeros"])
@pytest.mark.parametrize("rows", [32, 64, None])
def test_all_bytes_are_those_of_the_published_rule(kind, rows):
    weight = drawn(kind)
    blocks, scales = ours(weight, rows)
    expected = published(weight)
    assert torch.equal(scales, expected[1])
    assert torch.equal(blocks, expected[0])


def test_every_bfloat16_has_the_code_of_the_published_rule():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = bits.nan_to_num(0.0, 0.0, 0.0).view(8, 64, 128).contiguous()
    assert all(map(torch.equal, ours(weight), published(weight)))


def test_transformers_decodes_what_is_written():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight = drawn("weights")
    blocks, scales = ours(weight)
    values = decode(tuple(weight.shape), STORAGE, {"weight": blocks, "scale": scales})
    assert torch.equal(convert_moe_packed_tensors(blocks, scales).float(), values)
    assert 0.08 < float((values - weight).norm() / weight.norm()) < 0.13


def test_stored_experts_keep_their_values_on_new_scales():
    stored, values = tensors_of(FIXTURE), decoded(FIXTURE)
    for name in [name for name in values if name.endswith(STACKS)]:
        blocks, scales = ours(values[name])
        parts = {"weight": blocks, "scale": scales}
        assert torch.equal(decode(tuple(values[name].shape), STORAGE, parts), values[name])
        # The scale becomes smaller where no code of the group needs it.
        codes = stored[f"{name}_blocks"]
        largest = (codes & 7).maximum(codes >> 4 & 7).amax(-1)
        is_same = scales == stored[f"{name}_scales"]
        assert torch.equal(is_same, largest > 5)
        assert torch.equal(blocks[is_same], codes[is_same])


def test_a_group_of_small_codes_gets_another_scale_and_keeps_its_values():
    codes = torch.randint(0, 6, (1, 8, 2, 16), dtype=torch.uint8) * 17
    codes[..., 0] = 0x55  # 3.0 twice
    stored = {"weight": codes, "scale": torch.full((1, 8, 2), 120, dtype=torch.uint8)}
    values = decode((1, 64, 8), STORAGE, stored)
    blocks, scales = ours(values)
    assert torch.equal(scales, stored["scale"] - 1)
    assert torch.equal(decode((1, 64, 8), STORAGE, {"weight": blocks, "scale": scales}), values)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A gpt-oss in bfloat16 whose experts are cut by tiles, with an adapter: the base, the adapter, the logits of both."""
    root = tmp_path_factory.mktemp("gptoss")
    config = t.GptOssConfig(**{**plain_config(FIXTURE), **FEW})
    torch.manual_seed(4)
    model = t.GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.05)
    model.bfloat16().save_pretrained(root / "base")
    values = {name: tensor.float() for name, tensor in load_file(root / "base/model.safetensors").items()}
    logits = adapted(model_of(values, root / "base", root / "wide"), root / "adapter", **MIXED)
    return root / "base", root / "adapter", logits


@pytest.fixture(scope="module")
def outputs(made, tmp_path_factory):
    """Return the directories of a dense merge, in bfloat16, and of the same merge quantised."""
    root = tmp_path_factory.mktemp("outputs")
    base, adapter, _ = made
    dense = lora_merge.plan(base=base, adapter=adapter)
    quantised = lora_merge.plan(base=base, adapter=adapter, quantize="mxfp4")
    fill_all({root / "dense": dense, root / "mxfp4": quantised})
    return root / "dense", root / "mxfp4"


def stacks_of(tensors):
    return {name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")}


def test_the_experts_are_those_of_the_dense_output_by_the_published_rule(outputs):
    dense, quantised = map(tensors_of, outputs)
    stacks = stacks_of(quantised)
    assert len(stacks) == 4
    parts = {f"{name}_{end}" for name in stacks for end in ("blocks", "scales")}
    assert quantised.keys() == (dense.keys() - stacks) | parts
    for name in stacks:
        blocks, scales = published(dense[name])
        assert same_bytes(quantised[f"{name}_blocks"], blocks), name
        assert same_bytes(quantised[f"{name}_scales"], scales), name
    for name in dense.keys() - stacks:
        assert same_bytes(quantised[name], dense[name])


def test_tiles_that_cut_an_expert_fill_it_together(made, outputs, tmp_path):
    base, adapter, _ = made
    plan = lora_merge.plan(base=base, adapter=adapter, quantize="mxfp4")
    ops = [step.op for step in plan.steps if isinstance(step.op, Merge) and step.op.fills_across]
    assert len(ops) == 4
    assert max(len(op.tiles(1)) for op in ops) == 3 * 4
    assert {op.held_bytes for op in ops} == {256 * 256 * 17 // 32, 128 * 256 * 17 // 32}
    other = lora_merge.plan(base=base, adapter=adapter, dtype="float32")
    whole = effects_of(fill(plan, tmp_path / "whole"))
    roots = [tmp_path / name for name in ("out", "second", "wide")]
    records = fill_all(dict(zip(roots, (plan, plan, other), strict=True)), tile_elements=1)
    expected = tensors_of(outputs[1])
    for root in roots[:2]:
        found = tensors_of(root)
        assert found.keys() == expected.keys()
        assert all(same_bytes(found[name], expected[name]) for name in expected)
        assert effects_of(records[root]) == {
            name: pytest.approx(effect, rel=1e-4) for name, effect in whole.items()
        }
    assert sum(effect > 0 for effect, _ in whole.values()) == 4


def effects_of(records):
    """Return what is recorded of the adapter's effect: its size, and its error."""
    found = {record.name: record.survival for record in records if record.survival is not None}
    return {name: (one.effect_norm, one.effect_error) for name, one in found.items()}


@pytest.mark.parametrize("rounding", ["nearest", "adapter"])
def test_transformers_loads_what_a_merge_writes(rounding, made, cli, tmp_path):
    base, adapter, logits = made
    out = tmp_path / "out"
    arguments = ("--base", base, "--adapter", adapter, "--out", out, "--quantize", "mxfp4")
    result = cli(*arguments, "--rounding", rounding, "--no-verify")
    assert result.exit_code == exits.OK, result.stderr
    assert "quantised to MXFP4 as gpt-oss is published" in result.stderr
    assert ": 4 weights, " in result.stderr
    assert json.loads((out / "config.json").read_text())["quantization_config"] == PUBLISHED
    model, info = t.AutoModelForCausalLM.from_pretrained(
        out,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=t.Mxfp4Config(dequantize=True),
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found, wanted = logits_of(model.eval()), logits_of(model_of(decoded(out), out, tmp_path / "loaded"))
    assert torch.equal(found, wanted)
    assert float((found - logits).norm() / logits.norm()) < 0.25
    for level in ("sample", "full"):
        assert cli("verify", out, "--level", level).exit_code == exits.OK


def in_span(base, wanted, stored, rank=4):
    """Return the error of a stack's change on what the adapter sees of its inputs, relative to what the change does there."""
    change, error = wanted - base, stored - wanted
    # Of an expert [in, out] the columns of the change are what A sees.
    span = torch.linalg.svd(change.double(), full_matrices=False)[0][:, :, :rank].transpose(1, 2)
    return float((span @ error.double()).norm() / (span @ change.double()).norm())


def test_rounding_for_the_adapter_keeps_its_effect_on_the_experts(made, tmp_path):
    base, adapter, _ = made
    values, kept = decoded(base), {}
    wide = lora_merge.plan(base=base, adapter=adapter, dtype="float32")
    fill(wide, tmp_path / "wide")
    wanted = tensors_of(tmp_path / "wide")
    for rounding in ("nearest", "adapter"):
        plan = lora_merge.plan(base=base, adapter=adapter, quantize="mxfp4", rounding=rounding)
        records = {record.name: record for record in fill(plan, tmp_path / rounding)}
        stored = decoded_parts(tensors_of(tmp_path / rounding))
        errors = {name: in_span(values[name], wanted[name], stored[name]) for name in stored}
        assert len(errors) == 4
        for name, error in errors.items():
            said = records[f"{name}_blocks"].survival
            assert said.effect_error / said.effect_norm == pytest.approx(error, rel=0.02), name
        kept[rounding] = max(errors.values()), min(errors.values())
    assert kept["nearest"][1] > 0.8
    assert kept["adapter"][0] < 0.08


def decoded_parts(tensors):
    """Return the stacks of an output without its small files, decoded."""
    found = {}
    for name in stacks_of(tensors):
        blocks, scales = tensors[f"{name}_blocks"], tensors[f"{name}_scales"]
        experts, n_out, groups, _ = blocks.shape
        parts = {"weight": blocks, "scale": scales}
        found[name] = decode((experts, groups * 32, n_out), STORAGE, parts)
    return found


@pytest.mark.parametrize("rounding", ["nearest", "adapter", "stochastic"])
def test_every_rounding_is_verified_and_faults_are_found(rounding, made, tmp_path):
    base, adapter, _ = made
    evidence = evidence_of(base, adapter, tmp_path / "out", quantize="mxfp4", rounding=rounding)
    sample = replace(evidence, level="sample")
    assert list(CHECKS["recompute"](evidence)) == list(CHECKS["recompute"](sample)) == []
    step = next(step for step in evidence.plan.steps if step.name.endswith(STACKS))
    assert step.op.target == STORAGE
    path = tmp_path / "out" / step.main.file
    scales = step.writes["scale"].name
    before = path.read_bytes()

    def found(change):
        edit_tensors(path, change)
        codes = {issue.code for issue in CHECKS["recompute"](evidence) if issue.severity == "error"}
        path.write_bytes(before)
        return codes

    def codes_swapped(tensors):
        blocks = tensors[step.main.name]
        blocks[1] = blocks[1].bitwise_xor(0x77)

    def scale_doubled(tensors):
        tensors[scales][2, 5, 1] += 1

    def scale_halved(tensors):
        tensors[scales][0] -= 1

    assert found(lambda _: None) == set()
    for change in (codes_swapped, scale_doubled, scale_halved):
        assert found(change), change.__name__


def test_a_quantised_base_gets_new_scales_where_it_changes(cli, tmp_path, made):
    adapter = tmp_path / "adapter"
    values = decoded(FIXTURE)
    fields = {"target_modules": [], "target_parameters": ["model.layers.0.mlp.experts.down_proj"]}
    logits = adapted(model_of(values, FIXTURE, tmp_path / "wide"), adapter, **fields)
    for option, out in ((("--quantize", "mxfp4"), "mxfp4"), (("--dtype", "bfloat16"), "dense")):
        result = cli(
            "--base", FIXTURE, "--adapter", adapter, "--out", tmp_path / out, *option, "--allow-loss"
        )
        assert result.exit_code == exits.OK, result.stderr
    before, dense, found = (tensors_of(root) for root in (FIXTURE, tmp_path / "dense", tmp_path / "mxfp4"))
    assert found.keys() == before.keys()
    changed = {name for name in before if not same_bytes(before[name], found[name])}
    name = "model.layers.0.mlp.experts.down_proj"
    assert f"{name}_blocks" in changed
    assert changed <= {f"{name}_blocks", f"{name}_scales"}
    assert all(map(same_bytes, published(dense[name]), (found[f"{name}_blocks"], found[f"{name}_scales"])))
    assert json.loads((tmp_path / "mxfp4/config.json").read_text())["quantization_config"] == PUBLISHED
    near = logits_of(model_of(decoded(tmp_path / "mxfp4"), tmp_path / "mxfp4", tmp_path / "loaded"))
    assert 0 < float((near - logits).abs().max() / logits.abs().max()) < 0.1


def sizes_of(root, **fields):
    """Write a gpt-oss of one layer of other sizes, and an adapter of its queries."""
    config = {**plain_config(FIXTURE), "num_hidden_layers": 1, "layer_types": ["full_attention"], **fields}
    t.GptOssForCausalLM(t.GptOssConfig(**config)).bfloat16().save_pretrained(root / "base")
    adapter = root / "adapter"
    adapter.mkdir()
    shape = (4, config["hidden_size"])
    path, n_out = "base_model.model.model.layers.0.self_attn.q_proj", 64
    tensors = {f"{path}.lora_A.weight": torch.ones(shape), f"{path}.lora_B.weight": torch.ones(n_out, 4)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    return root / "base", adapter


def test_experts_that_no_group_of_32_fits_are_refused(tmp_path):
    base, adapter = sizes_of(tmp_path, intermediate_size=48)
    with pytest.raises(lora_merge.PlanError, match="no stack of experts") as caught:
        lora_merge.plan(base=base, adapter=adapter, quantize="mxfp4")
    assert "48 input features, which is not a multiple of 32" in str(caught.value)


def test_experts_one_by_one_are_refused(tmp_path):
    base, adapter = sizes_of(tmp_path)
    stack = "model.layers.0.mlp.experts"

    def apart(tensors):
        for name in ("gate_up_proj", "down_proj"):
            for number, one in enumerate(tensors.pop(f"{stack}.{name}")):
                tensors[f"{stack}.{name}s.{number}.weight"] = one.t().contiguous()

    edit_tensors(base / "model.safetensors", apart)
    with pytest.raises(lora_merge.PlanError, match="its experts are not in stacks"):
        lora_merge.plan(base=base, adapter=adapter, quantize="mxfp4")


def test_ignored_experts_stay_dense_and_are_named(made):
    base, adapter, _ = made
    plan = lora_merge.plan(base=base, adapter=adapter, quantize="mxfp4", ignore=["*.0.mlp.experts"])
    named = plan.config_patch.set["quantization_config"]["modules_to_not_convert"]
    assert named == [*PUBLISHED["modules_to_not_convert"], "model.layers.0.mlp.experts"]
    stored = {step.name for step in plan.steps if isinstance(step.op, Merge) and step.op.target == STORAGE}
    assert stored == {f"model.layers.1.{name}" for name in STACKS}


def test_other_schemes_take_the_attention_alone_and_say_so(made):
    base, adapter, _ = made
    plan = lora_merge.plan(base=base, adapter=adapter, quantize="int8")
    said = " ".join(issue.sentence for issue in plan.issues)
    assert "stack of experts" in said
    assert "--quantize mxfp4 stores the experts as in the published model" in said
    assert plan.config_patch.set["quantization_config"]["quant_method"] == "compressed-tensors"
