"""Bases and adapters in ``.bin`` files: the output is what the same weights in safetensors give, to the bit."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file

import lora_merge
from lora_merge.cli import exits
from lora_merge.core.plan import Copy
from tests.tampering import edit_json, edit_pickle, edit_records, to_pickles

INDEX = "pytorch_model.bin.index.json"


@pytest.fixture
def pickled(tampered):
    """Return a function: a base or an adapter in safetensors → a copy of it in ``.bin`` files."""

    def make(source, name="pickled"):
        root = tampered(source, name)
        to_pickles(root)
        return root

    return make


def digests(out):
    manifest = json.loads((out / "merge_manifest.json").read_text())
    return {name: entry["digest"] for name, entry in manifest["tensors"].items()}


def weights(out):
    return {name: t for path in out.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2"])
def test_a_pickled_base_gives_the_tensors_of_the_same_base_in_safetensors(
    family, dtype, pico, pico_adapter, pickled, cli, tmp_path
):
    base = pico(family, dtype)
    targets = {"target_modules": ["c_attn"], "fan_in_fan_out": True} if family == "gpt2" else {}
    adapter = pico_adapter(base, **targets)
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "plain").exit_code == exits.OK

    result = cli(
        "--base",
        pickled(base),
        "--adapter",
        adapter,
        "--out",
        tmp_path / "out",
        "--verify",
        "full",
        "--strict",
    )

    assert result.exit_code == exits.OK, result.stderr
    out = tmp_path / "out"
    assert digests(out) == digests(tmp_path / "plain")
    assert not list(out.glob("*.bin*"))
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_pickled_shards_become_the_shards_that_transformers_names(
    family, pico, pico_adapter, pickled, cli, tmp_path
):
    from transformers import AutoModelForCausalLM

    base = pico(family, "bfloat16", "40KB")
    adapter = pico_adapter(base)
    source = pickled(base)
    shards = sorted(path.name for path in source.glob("*.bin"))
    assert len(shards) > 2
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "plain").exit_code == exits.OK

    result = cli("--base", source, "--adapter", adapter, "--out", tmp_path / "out", "--verify", "full")

    assert result.exit_code == exits.OK, result.stderr
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    for name in (path.name for path in plain.glob("*.safetensors")):
        one, other = load_file(plain / name), load_file(out / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index == json.loads((plain / "model.safetensors.index.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(model.state_dict()["model.norm.weight"], weights(plain)["model.norm.weight"])


@pytest.mark.parametrize(
    "targets",
    [["q_proj"], ["q_proj", "embed_tokens"], ["q_proj", "lm_head"]],
    ids=["apart", "input", "output"],
)
def test_both_names_of_a_tie_in_one_storage_are_one_tie(targets, pico, pico_adapter, pickled, cli, tmp_path):
    """As ``torch.save(model.state_dict())`` leaves a tied model; safetensors has one of the names."""
    from transformers import AutoModelForCausalLM

    base = pico("llama_tied", "float32")
    adapter = pico_adapter(base, target_modules=targets)
    source = pickled(base)
    edit_pickle(
        source / "pytorch_model.bin",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}),
    )
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "plain").exit_code == exits.OK

    result = cli("--base", source, "--adapter", adapter, "--out", tmp_path / "out", "--verify", "full")

    assert result.exit_code == exits.OK, result.stderr
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert (out / "config.json").read_bytes() == (plain / "config.json").read_bytes()
    wanted, found = weights(plain), weights(out)
    wanted.setdefault("lm_head.weight", wanted["model.embed_tokens.weight"])
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(root)(tokens).logits for root in (plain, out))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens"]}],
    ids=["lora", "dora", "saved", "embedding"],
)
def test_a_pickled_adapter_gives_the_output_of_the_same_adapter_in_safetensors(
    fields, pico, pico_adapter, pickled, cli, tmp_path
):
    adapter = pico_adapter(pico(), **fields)
    source = pickled(adapter)
    assert (source / "adapter_model.bin").is_file()
    assert cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "plain").exit_code == exits.OK

    result = cli("--base", pico(), "--adapter", source, "--out", tmp_path / "out", "--verify", "full")

    assert result.exit_code == exits.OK, result.stderr
    plain, out = tmp_path / "plain", tmp_path / "out"
    assert (out / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_pickled_adapter_that_peft_s_layers_merge_gives_the_same_output(pico, pickled, cli, tmp_path):
    from peft import LoHaConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoHaConfig(r=4, alpha=8, target_modules=["q_proj"], init_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(pico()), config).save_pretrained(tmp_path / "loha")

    for adapter, out in ((tmp_path / "loha", "plain"), (pickled(tmp_path / "loha"), "out")):
        result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / out, "--verify", "full")
        assert result.exit_code == exits.OK, result.stderr

    plain, out = (tmp_path / name / "model.safetensors" for name in ("plain", "out"))
    assert plain.read_bytes() == out.read_bytes()


def test_safetensors_win_over_bin_files_beside_them(pico, pico_adapter, tampered, cli, tmp_path):
    base, adapter = tampered(pico(), "base"), tampered(pico_adapter(pico()), "adapter")
    for name in ("pytorch_model.bin", INDEX):
        (base / name).write_text("another model")
    (adapter / "adapter_model.bin").write_text("another adapter")
    arguments = ("--adapter", pico_adapter(pico()), "--out", tmp_path / "plain")
    assert cli("--base", pico(), *arguments).exit_code == exits.OK

    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "-v")

    assert result.exit_code == exits.OK, result.stderr
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    for name in ("pytorch_model.bin", INDEX):
        assert f"{name} was left out: the model is in model.safetensors" in result.stderr
        assert not (tmp_path / "out" / name).exists()


def test_what_a_pickled_index_does_not_name_is_left_out_with_a_note(
    pico, pico_adapter, pickled, cli, tmp_path
):
    base = pickled(pico("llama", "bfloat16", "40KB"))
    (base / "pytorch_model.bin").write_text("the weights again")
    (base / "pytorch_model-00009-of-00009.bin").write_text("stale")

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    for name in ("pytorch_model.bin", "pytorch_model-00009-of-00009.bin"):
        assert f"{name} was left out: the index does not name it" in result.stderr
    assert f"{INDEX} was left out" not in result.stderr


def test_pickled_shards_of_any_name_are_weights_and_no_side_files(pico, pico_adapter, pickled, cli, tmp_path):
    base = pickled(pico("llama", "bfloat16", "40KB"))
    index = json.loads((base / INDEX).read_text())
    for name in set(index["weight_map"].values()):
        (base / name).rename(base / name.replace("pytorch_model", "part"))
    edit_json(
        base / INDEX,
        weight_map={key: name.replace("pytorch_model", "part") for key, name in index["weight_map"].items()},
    )

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.OK, result.stderr
    assert not list((tmp_path / "out").glob("part*"))
    assert weights(tmp_path / "out").keys() == index["weight_map"].keys()


def test_other_shards_may_be_asked_of_a_pickled_base(pico, pico_adapter, pickled, cli, tmp_path):
    result = cli(
        "--base", pickled(pico()), "--adapter", pico_adapter(pico()), "--out", tmp_path / "out",
        "--max-shard-size", "40KB", "--dtype", "float16",
    )  # fmt: skip

    assert result.exit_code == exits.OK, result.stderr
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float16}


def test_a_plan_of_a_pickled_base_names_the_output_s_files_and_the_base_s(pico, pico_adapter, pickled):
    base = pickled(pico())
    plan = lora_merge.plan(base=base, adapter=pico_adapter(pico()))
    assert [file.name for file in plan.files] == ["model.safetensors"]
    sources = {step.op.source.file for step in plan.steps if isinstance(step.op, Copy)}
    assert sources == {str(base / "pytorch_model.bin")}


def test_a_file_that_only_torch_refuses_is_named_by_the_verification(
    pico, pico_adapter, pickled, cli, tmp_path
):
    base = pickled(pico())
    pushed_and_dropped = b"K\x010"  # torch.load knows no POP, and torch.save writes none
    edit_records(
        base / "pytorch_model.bin",
        lambda records: records.update(
            {"data.pkl": records["data.pkl"][:2] + pushed_and_dropped + records["data.pkl"][2:]}
        ),
    )

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert "pytorch_model.bin: torch cannot load it" in result.stderr
    assert not (tmp_path / "out").exists()


class Hostile:
    def __init__(self, mark):
        self._mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self._mark}",)


@pytest.mark.parametrize("role", ["base", "adapter"])
def test_a_hostile_file_is_refused_and_does_nothing(role, pico, pico_adapter, pickled, cli, tmp_path):
    roots = {"base": pico(), "adapter": pico_adapter(pico())}
    roots[role] = pickled(roots[role])
    (file,) = roots[role].glob("*model.bin")
    torch.save({"weight": torch.ones(2), "evil": Hostile(tmp_path / "mark")}, file)

    result = cli("--base", roots["base"], "--adapter", roots["adapter"], "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE
    assert f"{file.name}: would import posix.system, expected only plain tensors" in result.stderr
    assert "weights need no code" in result.stderr
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def missing_shard(base, index):
    name = sorted(set(index["weight_map"].values()))[1]
    (base / name).unlink()
    return f"does not have {name}"


def tensor_in_no_file(base, index):
    index["weight_map"]["ghost.weight"] = min(index["weight_map"].values())
    return f"{INDEX}: ghost.weight: is in no file"


def tensor_in_two_files(base, index):
    first, second, *_ = sorted(set(index["weight_map"].values()))
    name = next(name for name, file in index["weight_map"].items() if file == first)
    edit_pickle(base / second, lambda tensors: tensors.update({name: torch.ones(2)}))
    return f"{name}: is "


def outside(base, index):
    index["weight_map"]["model.norm.weight"] = "../../etc/passwd"
    return "expected a file inside the model's directory"


def no_index(base, index):
    (base / INDEX).unlink()
    index.clear()
    return "and their index pytorch_model.bin.index.json is missing"


@pytest.mark.parametrize("fault", [missing_shard, tensor_in_no_file, tensor_in_two_files, outside, no_index])
def test_a_pickled_base_whose_index_is_wrong_is_named(fault, pico, pico_adapter, pickled, cli, tmp_path):
    base = pickled(pico("llama", "bfloat16", "40KB"))
    index = json.loads((base / INDEX).read_text())
    words = fault(base, index)
    if index:
        (base / INDEX).write_text(json.dumps(index))

    result = cli("--base", base, "--adapter", pico_adapter(pico()), "--out", tmp_path / "out")

    assert result.exit_code == exits.RESOLVE, result.stderr
    assert words in result.stderr


def test_an_empty_pickled_adapter_is_named(pico, pico_adapter, pickled, cli, tmp_path):
    adapter = pickled(pico_adapter(pico()))
    torch.save({}, adapter / "adapter_model.bin")

    result = cli("--base", pico(), "--adapter", adapter, "--out", tmp_path / "out")

    assert result.exit_code == exits.PLAN
    assert "adapter_model.bin: contains no tensors" in result.stderr
