"""New scales are computed a second time: a wrong one is found though every code still fits, and no right one is refused."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from types import SimpleNamespace

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

import lora_merge
from lora_merge.checks import CHECKS, Evidence, choosing
from lora_merge.checks.new_scales import RULES, SCALE, rule_of_overall
from lora_merge.checks.overall_scales import OverallScales
from lora_merge.codecs import ENCODERS
from lora_merge.codecs.fresh_fp4 import global_scale
from lora_merge.core.tensor import STORED_TYPES
from lora_merge.core.view import View
from lora_merge.core.weight import Tile, Weight
from lora_merge.quantised.schemes import OF_GPT_OSS, SCHEMES
from tests.crossing import diagonal
from tests.filling import fill
from tests.rounding import adapter_for, evidence_of
from tests.storages import dense
from tests.storages.quantising import FITTING, MODELS, weights_of
from tests.storages.reference import FIXTURES, STACKS, adapted, decoded, model_of, plain_config
from tests.tampering import edit_tensors

ROUNDINGS = ("nearest", "adapter", "stochastic")
UP = "model.layers.0.mlp.up_proj.weight"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
PLANTED = [
    *((scheme, SCALE) for scheme in SCHEMES),
    *((scheme, "zero") for scheme in SCHEMES if "asym" in scheme),
    ("nvfp4", "global"),
]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Return a base that every scheme fits, and an adapter."""
    root = tmp_path_factory.mktemp("llama")
    base = dense.build(root / "base")
    return base, dense.lora(base, root / "lora")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    """Return a gpt-oss in bfloat16, and an adapter of its experts."""
    root = tmp_path_factory.mktemp("gptoss")
    torch.manual_seed(4)
    config = GptOssConfig(**{**plain_config(FIXTURES / "gptoss-mxfp4"), "intermediate_size": 96})
    GptOssForCausalLM(config).bfloat16().save_pretrained(root / "base")
    model = model_of(decoded(root / "base"), root / "base", root / "wide")
    adapted(model, root / "lora", target_modules=["q_proj"], target_parameters=list(STACKS))
    return root / "base", root / "lora"


def issues(evidence):
    return [issue for issue in CHECKS["recompute"](evidence) if issue.severity == "error"]


def step_of(evidence, name):
    return next(step for step in evidence.plan.steps if step.name == name)


def raise_one(root, part, units, place=None):
    """Raise an entry of a part by some units of its last place: what it was, and what it is, as stored."""
    seen = []

    def change(tensors):
        bits = tensors[part.name].view(INTEGERS[tensors[part.name].element_size()])
        at = tuple(size // 2 for size in bits.shape) if place is None else place
        seen.append(float(tensors[part.name][at]))
        bits[at] += units
        seen.append(float(tensors[part.name][at]))

    edit_tensors(root / part.file, change)
    return seen


# What is found.


@pytest.mark.parametrize(
    ("planted", "rounding", "units"),
    diagonal({"-".join(one): one for one in PLANTED}, ["nearest", "adapter"], [1, 2, 3]),
)
def test_an_entry_that_is_off_by_units_of_the_last_place_is_found(planted, rounding, units, llama, tmp_path):
    scheme, role = planted
    evidence = evidence_of(*llama, tmp_path / "out", quantize=scheme, rounding=rounding)
    part = step_of(evidence, UP).writes[role]
    before, after = raise_one(tmp_path / "out", part, units)
    for level in ("sample", "full"):
        found = [issue for issue in issues(replace(evidence, level=level)) if issue.code == "wrong-scale"]
        assert part.name in {issue.subject for issue in found}
        (sentence,) = (issue.sentence for issue in found if issue.subject == part.name)
        row, group = (size // 2 for size in part.shape) if role != "global" else (0, 0)
        if role == SCALE:
            assert sentence.startswith(f"row {row}, group {group}: the scale is ")
            # What is stored of a power of two is its exponent.
            assert part.dtype == "U8" or sentence.endswith(f" is {after:.9g}, expected {before:.9g}")
        if role == "zero":
            # Eight of them are in a word; the lowest was raised.
            assert sentence.startswith(f"row {8 * row}, group {group}: the zero point is ")
        if role == "global":
            assert sentence == f"the scale of the tensor is {after:.9g}, expected {before:.9g}"


def test_a_scale_that_every_code_fits_is_the_only_fault(llama, tmp_path):
    evidence = evidence_of(*llama, tmp_path / "out", quantize="int4", rounding="adapter")
    part = step_of(evidence, UP).writes[SCALE]
    before, after = raise_one(tmp_path / "out", part, 1, (0, 0))
    assert 1 < after / before < 1.01
    (issue,) = issues(evidence)
    assert issue.sentence == f"row 0, group 0: the scale is {after:.9g}, expected {before:.9g}"
    raise_one(tmp_path / "out", part, 1, (7, 0))
    issue = issues(evidence)[0]
    assert issue.sentence.endswith(f"; 2 of {prod(part.shape)} checked scales are wrong")


def test_a_scale_of_experts_is_found(gpt_oss, tmp_path):
    evidence = evidence_of(*gpt_oss, tmp_path / "out", quantize="mxfp4")
    part = step_of(evidence, EXPERTS).writes[SCALE]
    raise_one(tmp_path / "out", part, 1, (1, 5, 2))
    first = issues(evidence)[0]
    assert (first.code, first.subject) == ("wrong-scale", part.name)
    assert first.sentence.startswith("matrix 1, row 5, group 2: the scale is ")


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block"])
def test_a_scale_of_rows_that_come_in_chunks_is_found(scheme, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "_CHUNK_ELEMENTS", 48 * 128)
    evidence = evidence_of(*llama, tmp_path / "out", quantize=scheme)
    assert issues(evidence) == []
    part = step_of(evidence, UP).writes[SCALE]
    before, after = raise_one(tmp_path / "out", part, 1, (1, 0))
    first = issues(evidence)[0]
    assert first.subject == part.name
    assert first.sentence == f"row 1, group 0: the scale is {after:.9g}, expected {before:.9g}"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_a_scale_is_found(value, llama, tmp_path):
    evidence = evidence_of(*llama, tmp_path / "out", quantize="int4")
    part = step_of(evidence, UP).writes[SCALE]

    def change(tensors):
        tensors[part.name][3, 0] = value

    edit_tensors(tmp_path / "out" / part.file, change)
    assert [issue.subject for issue in issues(evidence) if issue.code == "wrong-scale"] == [part.name]


def test_a_sample_sees_the_scales_of_its_rows(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(choosing, "UNSEEN_ELEMENTS", 0)
    evidence = evidence_of(*llama, tmp_path / "out", "sample", quantize="int4-g32", rounding="adapter")
    step = step_of(evidence, UP)
    rows = choosing.some_rows(step.name, step.op)
    other = next(row for row in range(step.shape[0]) if row not in rows)
    for row, found in ((other, 0), (rows[-1], 1)):
        raise_one(tmp_path / "out", step.writes[SCALE], 1, (row, 1))
        assert [issue.code for issue in issues(evidence)] == ["wrong-scale"] * found


# What is not refused.

UNUSUAL = {"-".join(one): one for one in FITTING if one != ("fp8", "ragged")}
"""Every scheme with the weights that ``--quantize`` stores so: not FP8 in blocks of a matrix that they do not fill."""


@pytest.fixture(scope="module")
def unusual(tmp_path_factory):
    """Return a function: kind of weights → a base of them, an adapter of its layers, and one of its head alone."""
    found = {}

    def build(kind):
        if kind not in found:
            root, model = tmp_path_factory.mktemp(kind), MODELS[kind]
            config = LlamaConfig(
                vocab_size=32,
                hidden_size=model.hidden,
                intermediate_size=model.intermediate,
                num_attention_heads=model.heads,
                num_key_value_heads=model.kv_heads,
                head_dim=model.head_dim,
                num_hidden_layers=1,
                tie_word_embeddings=False,
            )
            llama = LlamaForCausalLM(config).bfloat16()
            weights = {f"{module}.weight": weight for module, weight in weights_of(kind).items()}
            llama.load_state_dict(weights, strict=False)
            llama.save_pretrained(root / "base")
            adapters = dense.lora(root / "base", root / "lora"), dense.of_head(root / "base", root / "head")
            found[kind] = root / "base", *adapters
        return found[kind]

    return build


@pytest.mark.parametrize(("model", "rounding"), diagonal(UNUSUAL, ROUNDINGS))
def test_scales_of_unusual_weights_are_right(model, rounding, unusual, tmp_path):
    scheme, kind = model
    base, *adapters = unusual(kind)
    for number, adapter in enumerate(adapters):
        evidence = evidence_of(base, adapter, tmp_path / str(number), quantize=scheme, rounding=rounding)
        assert [issue for issue in issues(evidence) if issue.code == "wrong-scale"] == []


@pytest.mark.parametrize(
    ("scheme", "fixture"),
    diagonal(list(SCHEMES), ["fp8-block", "bnb-nf4-double", "gptq-4bit-act-order", "awq-gemm", "mlx-4bit"]),
)
def test_scales_of_a_quantised_base_are_right(scheme, fixture, tmp_path):
    base = FIXTURES / fixture
    adapter = adapter_for(base, tmp_path / "lora")
    assert issues(evidence_of(base, adapter, tmp_path / "out", quantize=scheme)) == []


@pytest.mark.parametrize(("scheme", "dtype"), diagonal(list(SCHEMES), ["float32", "float16"]))
def test_scales_of_a_base_in_another_dtype_are_right(scheme, dtype, llama, tmp_path):
    base = dense.build(tmp_path / "base", dtype)
    assert issues(evidence_of(base, llama[1], tmp_path / "out", quantize=scheme)) == []


@pytest.mark.parametrize(
    ("scheme", "combine"), diagonal(list(SCHEMES), ["linear", "ties", "dare_linear", "dare_ties"])
)
def test_scales_of_several_adapters_are_right(scheme, combine, llama, tmp_path):
    base, adapter = llama
    plan = lora_merge.plan(
        base=base,
        adapter=[adapter, f"{dense.lora(base, tmp_path / 'second', share=0.2)}:0.5"],
        combine=combine,
        density=0.5,
        quantize=scheme,
    )
    evidence = Evidence(plan, tmp_path / "out", tuple(fill(plan, tmp_path / "out")), "full")
    assert issues(evidence) == []


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_scales_of_experts_are_right(rounding, gpt_oss, tmp_path):
    evidence = evidence_of(*gpt_oss, tmp_path / "out", quantize="mxfp4", rounding=rounding)
    assert issues(evidence) == issues(replace(evidence, level="sample")) == []


def test_a_weight_that_is_written_apart_counts_each_time_for_itself(llama):
    base, adapter = llama
    plan = lora_merge.plan(base=base, adapter=adapter, quantize="nvfp4")
    step = next(step for step in plan.steps if step.name.endswith("0.mlp.down_proj.weight"))
    weight = Weight(step.name, step.shape, step.op.target, step.writes)
    found = rule_of_overall().stored(torch.tensor([1.0], dtype=torch.float64))
    overall, reader = OverallScales(), SimpleNamespace(whole=lambda part: found)
    other = replace(step.op, deltas=())
    assert overall.issue(step.op, weight, reader) is None
    for op, largest in ((step.op, 1.0), (other, 3.0)):
        overall.add(op, SimpleNamespace(largest=torch.tensor([largest, largest], dtype=torch.float64)))
    assert overall.issue(step.op, weight, reader) is None
    assert overall.issue(other, weight, reader).sentence == "the scale of the tensor is 2688, expected 896"


# The rules alone.

SIZES = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
"""Every finite number of bfloat16 that is not below zero."""
STORAGES = {name: scheme.storage for name, scheme in SCHEMES.items()} | {
    "gpt-oss": OF_GPT_OSS["mxfp4"].storage
}


def made(storage, values, survey):
    """Return the scales of groups that are made of some values."""
    shape = tuple(values.shape)
    parts = ENCODERS[storage.codec].parts(shape, storage)
    out = {
        role: torch.zeros(size, dtype=getattr(torch, STORED_TYPES[dtype]))
        for role, (dtype, size) in parts.items()
    }
    n_rows = View.of(shape, stacked=True).n_rows
    ENCODERS[storage.codec].grid(Tile(shape, n_rows, 0, n_rows), values, out, storage, survey, None)
    scale = out["scale"].flatten()
    return torch.exp2(scale.double() - 127) if scale.dtype == torch.uint8 else scale.double()


@pytest.mark.parametrize("name", STORAGES)
def test_every_size_has_the_scale_that_is_made(name):
    storage, survey = STORAGES[name], None
    settings = dict(storage.settings)
    if "block_rows" in settings:
        storage = replace(storage, settings=tuple((settings | {"block_rows": 1, "block_columns": 1}).items()))
    if "global" in settings and settings["global"] != "none":
        survey = torch.tensor([3e38])
    rule = RULES[storage.codec](storage, None if survey is None else global_scale(survey).double())
    width = max(rule.rows, rule.columns)
    values = torch.zeros(len(SIZES), width)
    values[:, -1] = -SIZES
    values = values.T[None].contiguous() if rule.is_transposed else values
    sizes = SIZES.double()
    assert torch.equal(made(storage, values, survey), rule.stored(sizes))


def test_every_size_has_the_scale_of_the_tensor_that_is_made():
    expected = torch.cat([global_scale(size[None]) for size in SIZES])
    assert torch.equal(rule_of_overall().stored(SIZES.double()), expected.double())


def test_limits_with_no_number_between_them_have_two_scales():
    rule = RULES["scaled"](STORAGES["fp8"], None)
    near = torch.tensor([[1.0], [1 + 2.0**-7]], dtype=torch.float64)
    far = torch.tensor([[1.0], [1 + 2.0**-6]], dtype=torch.float64)
    between = rule.stored(near).mean(0)
    for scale in rule.stored(near):
        assert rule.is_explained(scale, near)
    assert not rule.is_explained(between, near)
    assert rule.is_explained(between, far)
    assert not rule.is_explained(rule.stored(far)[1] * 1.001, far)
