"""Outputs of quantised bases: decoded, carried, and mixed; verified later; alone, in a batch and resumed."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch

from lora_merge.cli import exits
from lora_merge.merging.staged import Staged
from tests.crossing import diagonal, only
from tests.storages.reference import (
    FIXTURES,
    NAMES,
    ONE_OF_EACH_METHOD,
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

# The output of mlx-6bit ends with a whole page.
each = pytest.mark.parametrize("name", only((*ONE_OF_EACH_METHOD, "mlx-6bit"), NAMES))
OF_DENSE = (*ONE_OF_EACH_METHOD, "gptq-4bit")
"""The biases of gptq-4bit are stored in another dtype than its other dense weights."""

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


@pytest.mark.parametrize("name", only(OF_DENSE, [name for name in NAMES if name != "mlx-experts"]))
def test_a_dense_output_computes_what_base_and_adapter_compute(name, case, cli, tmp_path):
    about, out = case(name), tmp_path / "out"
    run(cli, about, out, "--dtype", "float32")
    stored = tensors_of(out)
    assert stored.keys() == by_library(name).keys()
    # GPTQModel stores biases in float16 beside bfloat16; what the base keeps apart stays so.
    assert {path.rpartition(".")[2] for path, one in stored.items() if one.dtype != torch.float32} <= {"bias"}
    assert not has_settings(out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    bare = logits_of(model_of(by_library(name), about.base, tmp_path / "bare"))
    assert far(bare, about.logits) > 1e-2  # the adapter is seen
    assert far(logits_of(by_transformers(out)), about.logits) < CLOSE
    verified(cli, out)


def test_experts_that_mlx_stacks_are_not_written_dense(case, cli, tmp_path):
    about, out = case("mlx-experts"), tmp_path / "out"
    for more in ((), ("--out-storage", "dense")):
        result = cli("--base", about.base, "--adapter", about.adapter, "--out", out, *more)
        assert result.exit_code == exits.PLAN
        assert "switch_mlp" in result.stderr
        assert "no other engine could load a dense output" in result.stderr
        assert not out.exists()


def by_transformers(out):
    """Return an output as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def verified(cli, out):
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
    verified(cli, out)


def mates_of(name, weights):
    """Return what is to be dense in a mixed output with the adapter of `touching`."""
    if name == "gptoss-mxfp4":
        return {path for path in weights if path.startswith("model.layers.0.") and ".experts." in path}
    return {path for path in weights if path.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))}


def touching(name):
    if name == "gptoss-mxfp4":
        return {"target_modules": [], "target_parameters": ["model.layers.0.mlp.experts.gate_up_proj"]}
    return {"target_modules": ["q_proj"]}


@each
def test_a_mixed_output_keeps_every_other_tensor(name, case, cli, tmp_path):
    about, out = case(name, **touching(name)), tmp_path / "out"
    run(cli, about, out, "--out-storage", "mixed")
    before, after = tensors_of(about.base), tensors_of(out)
    weights = quantised_of(about.base)
    dense = mates_of(name, weights)
    gone = {ref.name for path in dense for ref in weights[path].parts.values()}
    assert after.keys() == (before.keys() - gone) | dense
    for path in dense:
        assert after[path].dtype == torch.bfloat16
        if not path.endswith(("q_proj.weight", "gate_up_proj")):
            assert same_bytes(after[path], by_library(name)[path].bfloat16()), path
    for path in before.keys() - gone:
        assert same_bytes(before[path], after[path]), path
    assert_excepted(name, about.base, out, {path.removesuffix(".weight") for path in dense})
    values = decoded(out)
    assert quantised_of(out).keys() == weights.keys() - dense
    assert all(torch.equal(values[path], by_library(name)[path]) for path in weights.keys() - dense)
    assert far(logits_of(model_of(values, out, tmp_path / "loaded")), about.logits) < ROUNDED
    verified(cli, out)


EXCEPTED = {
    "ct-": "ignore",
    "fp8-": "modules_to_not_convert",
    "gptoss-": "modules_to_not_convert",
    "awq-": "modules_to_not_convert",
    "torchao-": "modules_to_not_convert",
    "bnb-": "llm_int8_skip_modules",
    "modelopt-": "ignore",
}
"""Fixtures → the field that lists what is dense."""


def assert_excepted(name, base, out, modules):
    """Check that the configuration names all modules that have become dense, and what it named before."""
    before, config = (json.loads((root / "config.json").read_text()) for root in (base, out))
    if name.startswith("mlx-"):
        for table in (config["quantization"], config["quantization_config"]):
            assert all(table[module] is False for module in modules)
    elif name.startswith("gptq-"):
        for table in (config["quantization_config"], json.loads((out / "quantize_config.json").read_text())):
            rules = [rule.removeprefix("-:") for rule in table["dynamic"] if rule.startswith("-:")]
            assert all(any(re.match(rule, module) for rule in rules) for module in modules)
            assert not any(re.match(rule, "model.layers.0.mlp.down_proj") for rule in rules)
    else:
        key = next(key for start, key in EXCEPTED.items() if name.startswith(start))
        listed = set(config["quantization_config"][key])
        assert {
            module.partition(".gate_up_proj")[0].partition(".down_proj")[0] for module in modules
        } <= listed
        assert set(before["quantization_config"].get(key) or ()) <= listed
    if name.startswith("modelopt-"):
        side = json.loads((out / "hf_quant_config.json").read_text())
        assert modules <= set(side["quantization"]["exclude_modules"])


FUSED = {"down_proj": ("down_proj",), "up_proj": ("gate_proj", "up_proj"), "o_proj": ("o_proj",)}


@pytest.mark.parametrize(("name", "target"), diagonal(["ct-nvfp4", "gptq-4bit", "bnb-nf4"], FUSED.keys()))
def test_what_engines_fuse_is_dense_together(name, target, case, cli, tmp_path):
    about, out = case(name, target_modules=[target]), tmp_path / "out"
    run(cli, about, out, "--out-storage", "mixed")
    left = quantised_of(about.base).keys() - quantised_of(out).keys()
    assert {path.split(".")[-2] for path in left} == set(FUSED[target])


SAMPLE = (
    "ct-int4-asymmetric",
    "fp8-ragged",
    "gptoss-mxfp4",
    "bnb-nf4-double",
    "gptq-4bit-act-order",
    "mlx-3bit",
)


@pytest.mark.parametrize(("name", "storage"), diagonal(SAMPLE, ["dense", "mixed"]))
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


@pytest.mark.parametrize("name", SAMPLE)
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


@pytest.mark.parametrize(("name", "storage"), diagonal(["gptq-4bit", "bnb-nf4-double"], ["dense", "mixed"]))
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
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".yaml", ".md"}
    assert plain_config(FIXTURES / "ct-int4")["model_type"] == "llama"
