"""Every verb with a quantised base: forward passes, extraction, conversion, inspection, plans and batches."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.planning.resolve import resolve_base
from tests.crossing import diagonal
from tests.storages.reference import FIXTURES, LINEAR, beside, by_library, plain_config, tensors_of
from tests.storages.test_outputs import touching
from tests.tampering import edit_tensors, to_pickles

SOME = ("fp8-block", "bnb-nf4-double", "gptq-4bit-act-order", "ct-nvfp4", "mlx-4bit", "gptoss-mxfp4")
"""One storage of each way that parts lie beside each other, across, flat, and in stacks."""

LLAMAS = SOME[:-1]
DOWN = "model.layers.0.mlp.down_proj"

each = pytest.mark.parametrize("name", SOME)
each_llama = pytest.mark.parametrize("name", LLAMAS)


def ok(result):
    assert result.exit_code == exits.OK, result.stdout + result.stderr
    return result


def forward(proof):
    return next(finding for finding in proof.findings if finding.check == "forward")


def dense_twin(name, root, change=lambda path, value: value):
    """Write a checkpoint in float32 with the values of a fixture, each changed."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps({**plain_config(FIXTURES / name), "dtype": "float32"}))
    values = {path: change(path, value).float().contiguous() for path, value in by_library(name).items()}
    save_file(values, root / "model.safetensors", {"format": "pt"})
    return root


def of_rank(rank, shape, size=0.02):
    generator = torch.Generator().manual_seed(3)
    b, a = (torch.randn(*one, generator=generator) for one in ((shape[0], rank), (rank, shape[1])))
    return size * b @ a


def trained(path, value, sign=1):
    """Change two weights by matrices of rank 2."""
    return (
        value.float() + sign * of_rank(2, value.shape)
        if path.endswith(("q_proj.weight", "down_proj.weight"))
        else value
    )


def factors_of(adapter):
    """Return module → the change of a LoRA whose scale is in its factors."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = {}
    for key, a in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = a.shape[0]
            scale = config["alpha_pattern"].get(module.rpartition(".")[2], config["lora_alpha"]) / rank
            found[module] = scale * tensors[key.replace("lora_A", "lora_B")] @ a
    return found


# verify --forward


@pytest.mark.parametrize(("name", "storage"), diagonal(SOME, ["dense", "mixed", "carried"]))
def test_forward_passes_compare_with_peft_on_the_decoded_base(name, storage, case, cli, tmp_path):
    fields = {"dense": {}, "mixed": touching(name), "carried": beside(name)}[storage]
    if storage == "carried" and not fields:
        pytest.skip("all its layers are quantised")
    about, out = case(name, **fields), tmp_path / "out"
    chosen = () if storage == "carried" else ("--out-storage", storage)
    ok(cli("--base", about.base, "--adapter", about.adapter, "--out", out, *chosen))
    has_codes = any(weight.plain is None for weight in resolve_base(out).weights.values())
    assert has_codes == (storage != "dense")
    proof = lora_merge.verify(out, forward=True)
    assert proof.ok, [str(issue) for issue in proof.issues]
    assert forward(proof).detail.endswith("PEFT, unmerged")
    assert proof.comparisons


@each_llama
def test_a_forward_pass_sees_a_carried_weight_that_is_wrong(name, case, cli, tmp_path):
    about, out = case(name, **touching(name)), tmp_path / "out"
    ok(cli("--base", about.base, "--adapter", about.adapter, "--out", out, "--out-storage", "mixed"))
    weight = resolve_base(out).weights[f"{DOWN}.weight"]
    role = next(role for role in ("scale", "nested_absmax") if role in weight.parts)

    def wrong(tensors):
        scale = tensors[weight.parts[role].name]
        tensors[weight.parts[role].name] = (1.5 * scale.float()).to(scale.dtype)

    edit_tensors(out / "model.safetensors", wrong)
    assert forward(lora_merge.verify(out, forward=True)).state == "failed"


@each
def test_a_weighted_adapter_is_compared_before_rounding(name, case, cli, tmp_path):
    about, out = case(name, **touching(name)), tmp_path / "out"
    ok(cli("--base", about.base, "--adapter", f"{about.adapter}:0.5", "--out", out, "--out-storage", "mixed"))
    proof = lora_merge.verify(out, forward=True)
    assert proof.ok, [str(issue) for issue in proof.issues]
    assert forward(proof).detail.endswith("the merged weights before rounding")


def test_models_are_loaded_one_weight_at_a_time(case, cli, tmp_path, monkeypatch):
    """No list of decoded weights is held beside the model."""
    from lora_merge.verification.engines import hf

    about, out = case("fp8-block"), tmp_path / "out"
    ok(cli("--base", about.base, "--adapter", about.adapter, "--out", out))
    seen = []
    plain = hf.Loader._loaded

    def loaded(self, root, tensors):
        seen.extend(type(one) for one in (tensors or {}).values())
        return plain(self, root, tensors)

    monkeypatch.setattr(hf.Loader, "_loaded", loaded)
    assert lora_merge.verify(out, forward=True).ok
    assert set(seen) == {hf.Deferred}


# extract


@each_llama
def test_a_lora_is_extracted_from_a_training_of_a_quantised_base(name, cli, tmp_path):
    tuned = dense_twin(name, tmp_path / "tuned", trained)
    result = ok(
        cli(
            "extract",
            "--base",
            FIXTURES / name,
            "--tuned",
            tuned,
            "--rank",
            2,
            "--out",
            tmp_path / "lora",
            "--json",
        )
    )
    report = json.loads(result.stdout)
    assert {one["path"].rpartition(".")[2] for one in report["modules"]} == {"q_proj", "down_proj"}
    assert max(one["loss"]["residual"] / one["loss"]["norm"] for one in report["modules"]) < 1e-3
    for module, change in factors_of(tmp_path / "lora").items():
        shape = by_library(name)[f"{module}.weight"].shape
        assert torch.allclose(change, of_rank(2, shape), atol=1e-4), module
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(FIXTURES / name)
    assert any("the rounding of both" in issue["sentence"] for issue in report["issues"])
    ok(
        cli(
            "--base",
            FIXTURES / name,
            "--adapter",
            tmp_path / "lora",
            "--out",
            tmp_path / "out",
            "--dtype",
            "float32",
        )
    )
    wanted, got = tensors_of(tuned), tensors_of(tmp_path / "out")
    for path, value in wanted.items():
        assert torch.allclose(got[path], value, atol=1e-4), path


@each_llama
def test_a_lora_is_extracted_to_a_quantised_model(name, cli, tmp_path):
    base = dense_twin(name, tmp_path / "base", lambda path, value: trained(path, value, -1))
    ok(cli("extract", "--base", base, "--tuned", FIXTURES / name, "--rank", 2, "--out", tmp_path / "lora"))
    found = factors_of(tmp_path / "lora")
    assert {module.rpartition(".")[2] for module in found} == {"q_proj", "down_proj"}
    for module, change in found.items():
        shape = by_library(name)[f"{module}.weight"].shape
        assert torch.allclose(change, of_rank(2, shape), atol=1e-4), module


def test_a_lora_is_extracted_between_two_storages(cli, tmp_path):
    """Both are quantised from one model, so the difference is what they round."""
    before, after = by_library("ct-fp8-channel"), by_library("ct-int8")
    rank = min(before[f"{DOWN}.weight"].shape)
    arguments = (
        "--base",
        FIXTURES / "ct-fp8-channel",
        "--tuned",
        FIXTURES / "ct-int8",
        "--target",
        "down_proj",
    )
    ok(cli("extract", *arguments, "--rank", rank, "--out", tmp_path / "lora"))
    wanted = after[f"{DOWN}.weight"] - before[f"{DOWN}.weight"]
    assert wanted.abs().max() > 1e-4
    assert torch.allclose(factors_of(tmp_path / "lora")[DOWN], wanted, atol=1e-5)


@each_llama
def test_a_quantised_model_does_not_differ_from_itself(name, cli, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "tuned")
    arguments = (
        "--base",
        FIXTURES / name,
        "--tuned",
        tmp_path / "tuned",
        "--rank",
        2,
        "--out",
        tmp_path / "lora",
    )
    result = cli("extract", *arguments)
    assert result.exit_code == exits.PLAN
    assert "no module that LoRA can change differs from the base" in result.stderr
    # Nor from its decoded values.
    tuned = dense_twin(name, tmp_path / "dense")
    result = cli(
        "extract", "--base", FIXTURES / name, "--tuned", tuned, "--rank", 2, "--out", tmp_path / "lora"
    )
    assert "no module that LoRA can change differs from the base" in result.stderr


def test_scales_of_a_cache_are_no_part_of_a_model(cli, tmp_path):
    shutil.copytree(FIXTURES / "fp8-block", tmp_path / "base")
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(())}
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda tensors: tensors.update(scale))
    tuned = dense_twin("fp8-block", tmp_path / "tuned", trained)
    result = ok(
        cli("extract", "--base", tmp_path / "base", "--tuned", tuned, "--rank", 2, "--out", tmp_path / "lora")
    )
    assert "taken as unchanged" not in result.stderr


def test_a_quantised_embedding_is_carried_decoded(cli, tmp_path):
    name, embedding = "mlx-4bit", "model.embed_tokens.weight"
    base = dense_twin(
        name,
        tmp_path / "base",
        lambda path, value: value + 0.1 if path == embedding else trained(path, value),
    )
    ok(
        cli(
            "extract",
            "--base",
            base,
            "--tuned",
            FIXTURES / name,
            "--rank",
            2,
            "--save-modules",
            "--out",
            tmp_path / "lora",
        )
    )
    carried = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(carried[f"base_model.model.{embedding}"], by_library(name)[embedding])


def test_a_method_that_is_not_read_is_refused(cli, tmp_path):
    shutil.copytree(FIXTURES / "fp8-block", tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (tmp_path / "tuned" / "config.json").write_text(json.dumps(config))
    arguments = ("--base", FIXTURES / "fp8-block", "--tuned", tmp_path / "tuned", "--rank", 2)
    result = cli("extract", *arguments, "--out", tmp_path / "lora")
    assert result.exit_code == exits.PLAN
    assert "HQQ" in result.stderr


# convert


@each_llama
def test_a_dora_becomes_a_lora_on_the_decoded_base(name, case, cli, tmp_path):
    about = case(name, target_modules=["q_proj", "down_proj"], use_dora=True)
    base = dense_twin(name, tmp_path / "base")
    for to, root in (("coded", about.base), ("dense", base)):
        ok(cli("convert", about.adapter, "--base", root, "--to-lora", "--rank", 4, "--out", tmp_path / to))
    coded, dense = factors_of(tmp_path / "coded"), factors_of(tmp_path / "dense")
    assert coded.keys() == dense.keys()
    for module, change in coded.items():
        assert torch.allclose(change, dense[module], atol=1e-6), module


# inspect


@each
def test_inspect_says_how_the_base_stores_each_weight(name, case, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # on a narrow terminal the column is left out
    from lora_merge.quantised import describe

    about = case(name)
    data = json.loads(ok(cli("inspect", about.adapter, "--base", about.base, "--json")).stdout)
    weights = resolve_base(about.base).weights
    assert sum(data["storages"].values()) == len(weights)
    values = by_library(name)
    for row in data["modules"]:
        weight = weights.get(f"{row['path']}.weight") or weights[row["path"]]
        assert row["storage"] == describe(weight.storage)
        assert data["storages"][row["storage"]] > 0
        assert row["weight_norm"] == pytest.approx(float(values[weight.name].double().norm()), rel=1e-5)
    text = ok(cli("inspect", about.adapter, "--base", about.base)).stdout
    assert "base's weights" in text
    # A column, whose title may be on two lines, only where modules differ.
    assert ("stored" in text) == (len({row["storage"] for row in data["modules"]}) > 1)


def test_inspect_has_no_column_for_a_plain_base(case, cli, tmp_path):
    about, base = case("fp8-block"), dense_twin("fp8-block", tmp_path / "base")
    text = ok(cli("inspect", about.adapter, "--base", base)).stdout
    assert "as F32" in text
    assert "stored" not in text


# plan


@pytest.mark.parametrize("storage", ["dense", "mixed"])
def test_a_plan_has_the_bytes_of_each_storage(storage, case, cli, tmp_path):
    about = case("fp8-block", **touching("fp8-block"))
    arguments = ("--base", about.base, "--adapter", about.adapter, "--out-storage", storage)
    numbers = json.loads(ok(cli("plan", *arguments, "--json")).stdout)["summary"]["quantised"]
    n = len(LINEAR)
    assert (numbers["decoded"], numbers["kept"]) == ((n, 0) if storage == "dense" else (3, n - 3))
    text = ok(cli("plan", *arguments)).stdout
    kept = f", {numbers['kept']} copied as they are stored" if numbers["kept"] else "\n"
    assert f"{numbers['decoded']} decoded{kept}" in text
    ok(cli(*arguments, "--out", tmp_path / "out"))
    stored = sum(tensor.nbytes for tensor in tensors_of(tmp_path / "out").values())
    assert numbers[f"{storage}_bytes"] == stored
    assert numbers["dense_bytes"] > numbers["mixed_bytes"]


def test_the_plan_of_a_plain_base_says_nothing_of_storages(case, cli, tmp_path):
    about, base = case("fp8-block"), dense_twin("fp8-block", tmp_path / "base")
    arguments = ("plan", "--base", base, "--adapter", about.adapter)
    assert json.loads(ok(cli(*arguments, "--json")).stdout)["summary"]["quantised"] == {}
    assert "quantised weights" not in ok(cli(*arguments)).stdout


# batch


def test_jobs_of_one_quantised_base_decode_it_once(case, cli, tmp_path, monkeypatch):
    from lora_merge.codecs import CODECS

    about = case("fp8-block")
    config = about.adapter / "adapter_config.json"
    # An adapter that names no base is compared with none, so nothing is decoded for the plan.
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    codec, rows = type(CODECS["scaled"]), []
    decode = codec.decode
    monkeypatch.setattr(
        codec, "decode", lambda self, tile, *rest: (rows.append(tile), decode(self, tile, *rest))
    )
    job = {"base": str(about.base)}
    jobs = [
        {
            **job,
            "adapter": f"{about.adapter}:{weight}",
            "out": str(tmp_path / f"out-{weight}"),
            "out_storage": "dense",
        }
        for weight in (1, 0.5)
    ]
    (tmp_path / "jobs.json").write_text(json.dumps({"jobs": jobs}))
    ok(cli("batch", tmp_path / "jobs.json"))
    assert len(rows) == len(LINEAR)
    rows.clear()
    ok(cli("--base", about.base, "--adapter", about.adapter, "--out", tmp_path / "alone"))
    assert len(rows) == len(LINEAR)
    for path in (tmp_path / "alone").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out-1" / path.name).read_bytes()


def test_a_batch_makes_an_output_anew_when_its_storage_is_another(case, cli, tmp_path):
    about = case("fp8-block", **touching("fp8-block"))
    job = {
        "base": str(about.base),
        "adapter": str(about.adapter),
        "out": str(tmp_path / "out"),
        "out_storage": "mixed",
    }
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps({"jobs": [job]}))
    states = []
    for storage in ("mixed", "mixed", "dense"):
        jobs.write_text(
            json.dumps({"jobs": [{**job, "out_storage": storage, "overwrite": storage == "dense"}]})
        )
        result = ok(cli("batch", jobs, "--json"))
        states.append(json.loads(result.stdout)["jobs"][0]["state"])
    assert states == ["done", "kept", "done"]
    manifest = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert manifest["options"]["out_storage"] == "dense"
    assert resolve_base(tmp_path / "out").weights[f"{DOWN}.weight"].plain is not None


# .bin


@each_llama
def test_every_verb_reads_a_quantised_base_in_pickles(name, case, cli, tmp_path):
    about, base = case(name, **touching(name)), tmp_path / "base"
    shutil.copytree(about.base, base)
    to_pickles(base)
    out = tmp_path / "out"
    ok(
        cli(
            "--base",
            base,
            "--adapter",
            about.adapter,
            "--out",
            out,
            "--out-storage",
            "mixed",
            "--verify",
            "full",
        )
    )
    proof = lora_merge.verify(out, forward=True)
    assert proof.ok, [str(issue) for issue in proof.issues]
    rows = [
        json.loads(ok(cli("inspect", about.adapter, "--base", root, "--json")).stdout)["modules"]
        for root in (base, about.base)
    ]
    assert rows[0] == rows[1]
    tuned = dense_twin(name, tmp_path / "tuned", trained)
    ok(cli("extract", "--base", base, "--tuned", tuned, "--rank", 2, "--out", tmp_path / "lora"))
    ok(cli("plan", "--base", base, "--adapter", about.adapter))
