"""Outputs of quantised bases: decoded, carried, and mixed; verified later; alone, in a batch and resumed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lora_merge.cli import exits
from lora_merge.merging.staged import Staged
from tests.storages.reference import (
    FIXTURES,
    NAMES,
    SETTINGS,
    by_library,
    decoded,
    logits_of,
    model_of,
    plain_config,
    quantised_of,
    same_bytes,
    tensors_of,
)
from tests.tampering import to_pickles

each = pytest.mark.parametrize("name", NAMES)
CLOSE = 5e-6
"""Of float32 logits, of the largest: the order of sums differs."""

ROUNDED = 2e-2
"""Where some weights are stored in bfloat16."""

SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def run(cli, about, out, *more):
    result = cli("--base", about.base, "--adapter", about.adapter, "--out", out, *more)
    assert result.exit_code == exits.OK, result.stderr
    return result


def far(logits, reference):
    return float((logits - reference).abs().max() / reference.abs().max())


def has_settings(root):
    """Return what says that a checkpoint is quantised."""
    config = json.loads((root / "config.json").read_text())
    return [key for key in SETTINGS if key in config] + [
        file for file in SIDE_FILES if (root / file).exists()
    ]


@each
def test_a_dense_output_computes_what_base_and_adapter_compute(name, case, cli, tmp_path):
    about, out = case(name), tmp_path / "out"
    run(cli, about, out, "--dtype", "float32")
    stored = tensors_of(out)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert stored.keys() == by_library(name).keys()
    assert not has_settings(out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    bare = logits_of(model_of(by_library(name), about.base, tmp_path / "bare"))
    merged = logits_of(model_of(stored, out, tmp_path / "loaded"))
    assert far(bare, about.logits) > 1e-2  # the adapter is seen
    assert far(merged, about.logits) < CLOSE


@each
def test_a_dense_output_is_loaded_by_transformers_as_it_is(name, case, cli, tmp_path):
    from transformers import AutoModelForCausalLM

    if name == "mlx-experts":
        pytest.skip("MLX names stacked experts in its own way")
    about, out = case(name), tmp_path / "out"
    run(cli, about, out, "--dtype", "float32")
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert far(logits_of(model.eval()), about.logits) < CLOSE
    result = cli("verify", out, "--level", "full")
    assert result.exit_code == exits.OK, result.stdout + result.stderr


@each
def test_what_no_adapter_touches_is_carried(name, dense_case, cli, tmp_path):
    about, out = dense_case(name), tmp_path / "out"
    run(cli, about, out)
    before, after = tensors_of(about.base), tensors_of(out)
    assert before.keys() == after.keys()
    changed = {key for key in before if not same_bytes(before[key], after[key])}
    parts = {ref.name for weight in quantised_of(about.base).values() for ref in weight.parts.values()}
    assert changed
    assert not changed & parts
    configs = [json.loads((root / "config.json").read_text()) for root in (about.base, out)]
    assert [config.get(key) for config in configs for key in SETTINGS[:1]] == [
        configs[0].get(SETTINGS[0])
    ] * 2
    assert has_settings(about.base) == has_settings(out)
    for file in SIDE_FILES:
        if (about.base / file).exists():
            assert (about.base / file).read_bytes() == (out / file).read_bytes()
    assert far(logits_of(model_of(decoded(out), out, tmp_path / "loaded")), about.logits) < ROUNDED
    result = cli("verify", out, "--level", "full")
    assert result.exit_code == exits.OK, result.stdout + result.stderr


def mates_of(name, weights):
    """Return what is to be dense in a mixed output whose adapter touches `touching(name)`."""
    if name == "gptoss-mxfp4":
        return {path for path in weights if ".experts." in path}
    return {path for path in weights if path.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))}


def touching(name):
    if name == "gptoss-mxfp4":
        return {"target_modules": ["o_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    return {"target_modules": ["q_proj"]}


@each
def test_a_mixed_output_keeps_every_other_tensor(name, case, cli, tmp_path):
    about, out = case(name, **touching(name)), tmp_path / "out"
    run(cli, about, out, "--out-storage", "mixed")
    before, after = tensors_of(about.base), tensors_of(out)
    weights = quantised_of(about.base)
    dense = mates_of(name, weights)
    gone = {ref.name for path in dense for ref in weights[path].parts.values()}
    touched = {path for path in before if name == "gptoss-mxfp4" and path.endswith("o_proj.weight")}
    assert after.keys() == (before.keys() - gone) | dense
    for path in dense:
        assert after[path].dtype == torch.bfloat16
        if not path.endswith(("q_proj.weight", "gate_up_proj")):
            assert same_bytes(after[path], by_library(name)[path].bfloat16()), path
    for path in before.keys() - gone - touched:
        assert same_bytes(before[path], after[path]), path
    assert quantised_of(out).keys() == weights.keys() - dense


@each
def test_a_mixed_output_computes_what_base_and_adapter_compute(name, case, cli, tmp_path):
    about, out = case(name, **touching(name)), tmp_path / "out"
    run(cli, about, out, "--out-storage", "mixed")
    values = decoded(out)
    assert far(logits_of(model_of(values, out, tmp_path / "loaded")), about.logits) < ROUNDED
    # Where the adapter's weights are not rounded, nothing is.
    exact = {path: value for path, value in by_library(name).items() if path not in mates_of(name, values)}
    for path, value in exact.items():
        if not (name == "gptoss-mxfp4" and path.endswith("o_proj.weight")):
            assert torch.equal(values[path], value), path
    result = cli("verify", out, "--level", "full")
    assert result.exit_code == exits.OK, result.stdout + result.stderr


EXCEPTED = {
    "ct-": ("ignore", None),
    "fp8-": ("modules_to_not_convert", None),
    "gptoss-": ("modules_to_not_convert", None),
    "awq-": ("modules_to_not_convert", None),
    "torchao-": ("modules_to_not_convert", None),
    "bnb-": ("llm_int8_skip_modules", None),
    "modelopt-": ("ignore", ("hf_quant_config.json", "exclude_modules")),
}


@each
def test_a_mixed_output_says_what_is_dense(name, case, cli, tmp_path):
    about, out = case(name, **touching(name)), tmp_path / "out"
    run(cli, about, out, "--out-storage", "mixed")
    modules = {path.removesuffix(".weight") for path in mates_of(name, quantised_of(about.base))}
    config = json.loads((out / "config.json").read_text())
    before = json.loads((about.base / "config.json").read_text())
    if name.startswith("mlx-"):
        for table in (config["quantization"], config["quantization_config"]):
            assert all(table[module] is False for module in modules)
        return
    settings = config["quantization_config"]
    if name.startswith("gptq-"):
        import re

        tables = [settings, json.loads((out / "quantize_config.json").read_text())]
        for table in tables:
            rules = [rule.removeprefix("-:") for rule in table["dynamic"] if rule.startswith("-:")]
            assert all(any(re.match(rule, module) for rule in rules) for module in modules)
            assert not any(re.match(rule, "model.layers.0.mlp.down_proj") for rule in rules)
        return
    key, side = next(value for start, value in EXCEPTED.items() if name.startswith(start))
    named = {module if "experts" not in module else module.rpartition(".")[0] for module in modules}
    assert named <= set(settings[key])
    assert set(before["quantization_config"].get(key) or ()) <= set(settings[key])
    if side:
        assert modules <= set(json.loads((out / side[0]).read_text())["quantization"][side[1]])


@pytest.mark.parametrize(
    ("target", "dense"),
    [("down_proj", ("down_proj",)), ("up_proj", ("gate_proj", "up_proj")), ("o_proj", ("o_proj",))],
)
@pytest.mark.parametrize("name", ["ct-nvfp4", "gptq-4bit", "bnb-nf4"])
def test_what_engines_fuse_is_dense_together(name, target, dense, case, cli, tmp_path):
    about, out = case(name, target_modules=[target]), tmp_path / "out"
    run(cli, about, out, "--out-storage", "mixed")
    left = quantised_of(about.base).keys() - quantised_of(out).keys()
    assert {path.split(".")[-2] for path in left} == set(dense)


SAMPLE = (
    "ct-int4-asymmetric",
    "fp8-ragged",
    "gptoss-mxfp4",
    "bnb-nf4-double",
    "gptq-4bit-act-order",
    "mlx-3bit",
)
some = pytest.mark.parametrize("name", SAMPLE)


@some
@pytest.mark.parametrize("storage", ["dense", "mixed"])
def test_an_interrupted_merge_goes_on(name, storage, case, cli, tmp_path, monkeypatch):
    about = case(name, **touching(name))
    more = ("--out-storage", storage, "--resume")
    run(cli, about, tmp_path / "whole", *more)
    arguments = ("--base", about.base, "--adapter", about.adapter, "--out", tmp_path / "out", *more)
    with monkeypatch.context() as patch:
        patch.setattr(Staged, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli(*arguments).exit_code == exits.INTERRUPTED
    assert not (tmp_path / "out").exists()
    run(cli, about, tmp_path / "out", *more)
    assert_same_weights(tmp_path / "whole", tmp_path / "out")


@some
def test_a_batch_writes_what_single_merges_write(name, case, cli, tmp_path):
    about = case(name, **touching(name))
    jobs = [
        {
            "base": str(about.base),
            "adapter": f"{about.adapter}:{weight}",
            "out": str(tmp_path / f"{storage}-{weight}"),
        }
        | {"out_storage": storage}
        for weight, storage in ((1, "dense"), (0.5, "mixed"))
    ]
    (tmp_path / "jobs.yaml").write_text(json.dumps({"jobs": jobs}))
    result = cli("batch", tmp_path / "jobs.yaml")
    assert result.exit_code == exits.OK, result.stderr
    for n, job in enumerate(jobs):
        alone = tmp_path / f"alone-{n}"
        arguments = ("--base", job["base"], "--adapter", job["adapter"], "--out-storage", job["out_storage"])
        assert cli(*arguments, "--out", alone).exit_code == exits.OK
        assert_same_weights(alone, tmp_path / job["out"])


def assert_same_weights(one, other):
    files = sorted(path.name for path in one.glob("*.safetensors*"))
    assert files == sorted(path.name for path in other.glob("*.safetensors*"))
    for file in (*files, "config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("storage", ["dense", "mixed"])
@pytest.mark.parametrize("name", ["gptq-4bit", "bnb-nf4-double"])
def test_a_pickled_base_gives_the_same_weights(name, storage, case, cli, tmp_path):
    about = case(name, **touching(name))
    pickled = tmp_path / "pickled"
    shutil.copytree(about.base, pickled)
    to_pickles(pickled)
    assert not list(pickled.glob("*.safetensors"))
    run(cli, about, tmp_path / "whole", "--out-storage", storage)
    run(cli, about._replace(base=pickled), tmp_path / "out", "--out-storage", storage)
    before, after = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bytes(before[key], after[key]) for key in before)


def test_the_fixtures_are_not_written_into():
    assert not [
        path for path in FIXTURES.rglob("*") if path.suffix not in {".json", ".safetensors", ".yaml", ".md"}
    ]
    assert plain_config(FIXTURES / "ct-int4")["model_type"] == "llama"
