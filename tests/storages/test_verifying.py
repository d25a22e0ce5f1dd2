"""Outputs on the base's own scales, and outputs that are quantised: every storage and rounding is verified, and faults are found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import lora_merge
from lora_merge.checks import CHECKS, choosing
from lora_merge.checks.bounds import REACH
from lora_merge.cli import exits
from lora_merge.core.plan import Merge
from lora_merge.merging.staged import Staged
from lora_merge.quantised.schemes import SCHEMES
from lora_merge.rounding import bands
from tests.crossing import diagonal, only
from tests.rounding import adapter_for, evidence_of
from tests.storages.reference import FIXTURES, NAMES, ONE_OF_EACH
from tests.tampering import edit_json, edit_tensors

ROUNDINGS = ("nearest", "adapter", "stochastic")
STORAGES = ("ct-int4", "ct-fp8-channel", "ct-nvfp4", "bnb-nf4", "gptq-4bit-act-order", "awq-gemm", "mlx-4bit")
MANIFEST = "merge_manifest.json"


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Return a function: checkpoint → a directory of an adapter for it."""
    found = {}

    def make(base):
        if base not in found:
            found[base] = adapter_for(base, tmp_path_factory.mktemp("adapters") / "adapter")
        return found[base]

    return make


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A Llama in bfloat16, wide enough for every scheme."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    root = tmp_path_factory.mktemp("plain") / "base"
    LlamaForCausalLM(config).bfloat16().save_pretrained(root)
    return root


def errors(evidence):
    return {issue.code for issue in CHECKS["recompute"](evidence) if issue.severity == "error"}


def merges(evidence):
    return [step for step in evidence.plan.steps if isinstance(step.op, Merge) and step.op.deltas]


def test_verification_lets_values_move_as_far_as_the_rounding_says():
    assert REACH == bands.REACH


# `adapter_for` changes the attention of gpt-oss alone, which is stored plain.
@pytest.mark.parametrize("name", only(ONE_OF_EACH, [name for name in NAMES if name != "gptoss-mxfp4"]))
def test_every_storage_is_verified_on_its_own_scales(name, adapters, tmp_path):
    base = FIXTURES / name
    evidence = evidence_of(base, adapters(base), tmp_path / "out", out_storage="base")
    steps = merges(evidence)
    assert any(not step.op.target.is_dense for step in steps)
    assert all(step.op.rounding.method == "adapter" for step in steps if not step.op.target.is_dense)
    assert all(choosing.has_formula(step.op) for step in steps)
    assert list(CHECKS["recompute"](evidence)) == []
    assert list(CHECKS["recompute"](replace(evidence, level="sample"))) == []


@pytest.mark.parametrize(("name", "rounding"), diagonal(STORAGES, ["stochastic", "nearest"]))
def test_other_roundings_are_verified_too(name, rounding, adapters, tmp_path):
    base = FIXTURES / name
    evidence = evidence_of(base, adapters(base), tmp_path / "out", out_storage="base", rounding=rounding)
    assert errors(evidence) == set()
    # What one rounding makes is no other's.
    for other in ROUNDINGS:
        plan = lora_merge.plan(base=base, adapter=adapters(base), out_storage="base", rounding=other)
        found = errors(replace(evidence, plan=plan))
        assert found == {
            "nearestadapter": {"effect-lost"},
            "stochasticnearest": {"wrong-value"},
        }.get(rounding + other, found - {"wrong-value", "wrong-effect", "effect-lost"})


@pytest.mark.parametrize(("scheme", "rounding"), diagonal(list(SCHEMES), ROUNDINGS))
def test_every_scheme_is_verified(scheme, rounding, plain, adapters, tmp_path):
    evidence = evidence_of(plain, adapters(plain), tmp_path / "out", quantize=scheme, rounding=rounding)
    assert sum(not step.op.target.is_dense for step in merges(evidence)) == 7
    assert list(CHECKS["recompute"](evidence)) == []
    assert list(CHECKS["recompute"](replace(evidence, level="sample"))) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rounding", ["adapter", "stochastic"])
def test_plain_dtypes_are_verified(dtype, rounding, plain, adapters, tmp_path):
    evidence = evidence_of(plain, adapters(plain), tmp_path / "out", dtype=dtype, rounding=rounding)
    assert errors(evidence) == errors(replace(evidence, level="sample")) == set()
    suspects = [record.suspects for record in evidence.records if record.survival]
    assert len(suspects) == 7
    assert all(ranges is not None for ranges in suspects)
    assert sum(last - first for ranges in suspects for first, last in ranges) <= 2


def moved(tensor, levels):
    """Move one code by some levels: the first that has room."""
    if tensor.dtype == torch.int32:  # the lowest of eight
        word = (tensor & 15 < 16 - levels).nonzero()[0]
        tensor[tuple(word)] += levels
    else:
        codes = tensor.view(torch.int8)
        place = (codes.int().abs() < 100).nonzero()[0]
        codes[tuple(place)] += levels


CODED = {"ct-int4": "weight_packed", "ct-int8": "weight", "ct-fp8-channel": "weight"}


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize(
    ("rounding", "levels", "found"),
    [("nearest", 4, {"wrong-value"}), ("adapter", 1, {"wrong-effect"}), ("stochastic", 4, {"wrong-value"})],
)
def test_a_code_that_moved_is_found(name, rounding, levels, found, adapters, tmp_path):
    base = FIXTURES / name
    evidence = evidence_of(base, adapters(base), tmp_path / "out", out_storage="base", rounding=rounding)
    step = merges(evidence)[0]
    edit_tensors(tmp_path / "out" / step.main.file, lambda tensors: moved(tensors[step.main.name], levels))
    assert errors(evidence) == found
    assert errors(replace(evidence, level="sample")) == found
    (issue,) = CHECKS["recompute"](evidence)
    assert issue.subject == step.name


def test_a_code_far_from_its_value_is_found_whatever_the_rounding(adapters, tmp_path):
    base = FIXTURES / "ct-int8"
    evidence = evidence_of(base, adapters(base), tmp_path / "out", out_storage="base")
    step = merges(evidence)[0]
    edit_tensors(tmp_path / "out" / step.main.file, lambda t: moved(t[step.main.name], 2 * REACH + 2))
    assert errors(evidence) == {"wrong-value"}


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme.startswith("int4")])
def test_another_shape_in_the_part_that_states_it_is_found(scheme, plain, adapters, tmp_path):
    evidence = evidence_of(plain, adapters(plain), tmp_path / "out", quantize=scheme)
    name = "model.layers.0.mlp.up_proj.weight_shape"
    step = next(step for step in evidence.plan.steps if any(slot.name == name for slot in step.slots))

    def grow(tensors):
        tensors[name][0] += 1

    edit_tensors(tmp_path / "out" / step.main.file, grow)
    for level in ("sample", "full"):
        (issue,) = CHECKS["recompute"](replace(evidence, level=level))
        assert (issue.severity, issue.code, issue.subject) == ("error", "wrong-shape", name)
        assert "says that the weight has shape [385, 256], expected [384, 256]" in issue.sentence


def test_an_effect_that_is_not_recorded_is_told(plain, adapters, tmp_path):
    evidence = evidence_of(plain, adapters(plain), tmp_path / "out", rounding="adapter")
    unknown = tuple(replace(record, survival=None) for record in evidence.records)
    for level in ("sample", "full"):
        found = list(CHECKS["recompute"](replace(evidence, level=level, records=unknown)))
        assert {(issue.severity, issue.code) for issue in found} == {("note", "effect-unknown")}
        assert len(found) == 7


def test_wrong_rows_are_listed_however_far_they_are_apart(plain, adapters, tmp_path):
    evidence = evidence_of(plain, adapters(plain), tmp_path / "out")
    step = next(step for step in merges(evidence) if step.name.endswith("up_proj.weight"))

    def spoil(tensors):
        tensors[step.main.name][[5, 6, 300, 383]] = 0

    edit_tensors(tmp_path / "out" / step.main.file, spoil)
    (issue,) = CHECKS["recompute"](replace(evidence, level="full"))
    assert issue.sentence.endswith("; 4 of 384 checked rows are wrong: 5 to 6, 300, 383")


@pytest.mark.parametrize(("name", "rounding"), diagonal(STORAGES, ["nearest", "adapter"]))
def test_a_scale_that_changed_is_found(name, rounding, adapters, tmp_path):
    base = FIXTURES / name
    evidence = evidence_of(base, adapters(base), tmp_path / "out", out_storage="base", rounding=rounding)
    step = next(step for step in merges(evidence) if not step.op.target.is_dense)
    role = "absmax" if step.op.target.codec == "bnb4" else "scale"
    scale = step.op.source.parts[role].name

    def double(tensors):
        if tensors[scale].dtype == torch.float8_e4m3fn:
            tensors[scale].view(torch.uint8).add_(8)
        else:
            tensors[scale].mul_(2)

    edit_tensors(tmp_path / "out" / step.main.file, double)
    # Of 16 levels most are within reach of rounding for the adapter, but not with the effect kept.
    (found,) = errors(evidence)
    assert found in ({"wrong-value", "effect-lost"} if rounding == "adapter" else {"wrong-value"})


@pytest.mark.parametrize("name", STORAGES)
def test_nearest_numbers_that_pass_for_the_adapters_are_found(name, adapters, tmp_path):
    base = FIXTURES / name
    made = evidence_of(base, adapters(base), tmp_path / "nearest", out_storage="base", rounding="nearest")
    wanted = evidence_of(base, adapters(base), tmp_path / "adapter", out_storage="base", level="sample")
    # Whether what is recorded is honest or not.
    assert errors(replace(wanted, root=made.root, records=made.records)) == {"effect-lost"}
    assert errors(replace(wanted, root=made.root)) == {"effect-lost"}


@pytest.mark.parametrize("share", [1e-4, 1e4])
@pytest.mark.parametrize("name", ["ct-int4", "bnb-nf4", "mlx-4bit", "gptq-4bit-act-order"])
def test_a_change_that_no_code_can_keep_is_no_fault(name, share, tmp_path):
    base = FIXTURES / name
    adapter = adapter_for(base, tmp_path / "adapter", share=share)
    evidence = evidence_of(base, adapter, tmp_path / "out", out_storage="base")
    assert errors(evidence) == errors(replace(evidence, level="sample")) == set()


def test_codes_under_a_dtype_of_floats_are_verified(adapters, cli, tmp_path):
    """``bnb_4bit_quant_storage``: read as floats, some codes are NaN."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(FIXTURES / "bnb-nf4", base)

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight"):
                tensors[name] = tensor.flatten().view(torch.bfloat16)[:, None]

    edit_tensors(base / "model.safetensors", change)
    adapter = adapters(FIXTURES / "bnb-nf4")
    result = cli("--base", base, "--adapter", adapter, "--out", out, "--out-storage", "base")
    assert result.exit_code == exits.OK, result.stderr
    result = cli("verify", out, "--level", "full")
    assert result.exit_code == exits.OK, result.stdout


def test_one_small_change_among_others_is_told(adapters, cli, tmp_path):
    base, adapter = FIXTURES / "ct-int4", tmp_path / "adapter"
    shutil.copytree(adapters(base), adapter)
    changed = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: tensors.update({changed: tensors[changed] * 1e-3}),
    )
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--out-storage", "base")
    assert result.exit_code == exits.OK, result.stderr
    said = " ".join(result.stderr.split())
    assert "k_proj.weight_packed: rounding for the adapter" in said
    assert "1 of 7 tensors whose change is small keeps less than half of it, this one 0%" in said


@pytest.mark.parametrize(
    ("field", "factor"), [("effect_error", 0.98), ("effect_error", 1.02), ("effect_norm", 1.001)]
)
@pytest.mark.parametrize("name", ["ct-int4", "fp8-block"])
def test_a_record_of_another_effect_is_found(name, field, factor, adapters, tmp_path):
    base = FIXTURES / name
    evidence = evidence_of(base, adapters(base), tmp_path / "out", out_storage="base")
    records = [
        replace(record, survival=replace(one, **{field: getattr(one, field) * factor}))
        if (one := record.survival) is not None
        else record
        for record in evidence.records
    ]
    assert errors(replace(evidence, records=tuple(records))) == {"wrong-effect"}


def test_a_few_rows_show_that_more_was_lost_than_recorded(plain, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "WHOLE_ELEMENTS", 0)
    monkeypatch.setattr(choosing, "UNSEEN_ELEMENTS", 0)
    evidence = evidence_of(plain, adapters(plain), tmp_path / "out", "sample", quantize="int4")
    (first, *_) = (record for record in evidence.records if record.survival)
    assert errors(evidence) == set()
    for share, found in ((0.5, set()), (0.02, {"wrong-effect"})):
        survival = replace(first.survival, effect_error=first.survival.effect_error * share)
        records = [replace(one, survival=survival) if one is first else one for one in evidence.records]
        assert errors(replace(evidence, records=tuple(records))) == found


@pytest.mark.parametrize(
    "options",
    [
        ("--out-storage", "base"),
        ("--out-storage", "base", "--rounding", "stochastic", "--seed", "5"),
        ("--out-storage", "base", "--rounding", "nearest", "--allow-loss"),
    ],
)
def test_an_output_is_verified_later_from_its_manifest(options, adapters, cli, tmp_path):
    base = FIXTURES / "ct-int4"
    out = tmp_path / "out"
    merged = cli("--base", base, "--adapter", adapters(base), "--out", out, *options)
    assert merged.exit_code == exits.OK, merged.stderr
    manifest = json.loads((out / MANIFEST).read_text())
    deltas = [row["delta"] for row in manifest["tensors"].values() if "delta" in row]
    assert len(deltas) > 4
    assert all({"kept_share", "effect_norm", "effect_error"} <= row.keys() for row in deltas)
    assert ("seed" in manifest["options"]) == ("--rounding" in options)
    for level in ("sample", "full"):
        assert cli("verify", out, "--level", level).exit_code == exits.OK
    name = next(name for name, row in manifest["tensors"].items() if "delta" in row)
    manifest["tensors"][name]["delta"]["effect_norm"] *= 1.01
    edit_json(out / MANIFEST, tensors=manifest["tensors"])
    result = cli("verify", out, "--json")
    assert result.exit_code == exits.VERIFY, result.stdout
    findings = [row for row in json.loads(result.stdout)["findings"] if row["issues"]]
    assert [row["check"] for row in findings] == ["recompute"]
    assert [(row["code"], row["subject"]) for row in findings[0]["issues"]] == [
        ("wrong-effect", name.removesuffix("_packed"))
    ]


def test_a_quantised_output_is_verified_later_from_its_manifest(plain, adapters, cli, tmp_path):
    out = tmp_path / "out"
    options = ("--quantize", "int4", "--ignore", "*.o_proj", "--rounding", "adapter")
    merged = cli("--base", plain, "--adapter", adapters(plain), "--out", out, *options)
    assert merged.exit_code == exits.OK, merged.stderr
    recorded = json.loads((out / MANIFEST).read_text())["options"]
    assert (recorded["quantize"], recorded["ignore"]) == ("int4", ["*.o_proj"])
    for level in ("sample", "full"):
        result = cli("verify", out, "--level", level)
        assert result.exit_code == exits.OK, result.stdout + result.stderr


def test_a_resumed_run_records_what_an_uninterrupted_one_does(adapters, cli, tmp_path, monkeypatch):
    base = FIXTURES / "ct-int4"
    options = ("--base", base, "--adapter", adapters(base), "--out-storage", "base", "--resume")
    assert cli(*options, "--out", tmp_path / "whole").exit_code == exits.OK
    with monkeypatch.context() as patch:
        patch.setattr(Staged, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*options, "--out", tmp_path / "out").exit_code == exits.INTERRUPTED
    result = cli(*options, "--out", tmp_path / "out")
    assert result.exit_code == exits.OK, result.stderr
    assert "had already written" in result.stderr
    whole, resumed = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("whole", "out"))
    assert any("effect_error" in row.get("delta", ()) for row in whole["tensors"].values())
    assert whole == resumed
