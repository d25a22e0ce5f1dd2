"""The gate: a good output passes every rule, each planted fault is found, and what is the base's own is milder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import lora_merge
from lora_merge.checks.gate import RULES
from lora_merge.formats.written_checkpoint import read_output
from tests.parity import family_building
from tests.parity.families import FAMILIES
from tests.tampering import edit_json, edit_tensors

INDEX = "model.safetensors.index.json"


@pytest.fixture
def out(pico, pico_adapter, tmp_path) -> Path:
    """The directory of a sharded merge."""
    base = pico("llama", "bfloat16", "40KB")
    lora_merge.merge(base=base, adapter=pico_adapter(base), out=tmp_path / "out")
    return tmp_path / "out"


def found_by_rule(root: Path) -> dict[str, set[str]]:
    """Return the codes of the errors that each rule finds."""
    output = read_output(root)
    return {
        name: {issue.code for issue in rule(output) if issue.severity == "error"}
        for name, rule in RULES.items()
    }


def shards(root: Path) -> list[Path]:
    return sorted(root.glob("model-*.safetensors"))


def holder(root: Path, tensor: str) -> Path:
    """Return the shard that has a tensor."""
    return root / json.loads((root / INDEX).read_text())["weight_map"][tensor]


def without(root: Path, *tensors: str, listed: bool) -> None:
    """Remove tensors from their shards, and from the index unless they stay listed."""
    index = json.loads((root / INDEX).read_text())
    for name in tensors:
        edit_tensors(root / index["weight_map"][name], lambda table, name=name: table.pop(name))
    if not listed:
        weight_map = {name: file for name, file in index["weight_map"].items() if name not in tensors}
        edit_json(root / INDEX, weight_map=weight_map, metadata={})


def doubled(root: Path) -> None:
    """Store a tensor in a second shard as well."""
    from safetensors.torch import load_file

    one = holder(root, "model.norm.weight")
    other = next(path for path in shards(root) if path != one)
    tensor = load_file(one)["model.norm.weight"]
    edit_tensors(other, lambda table: table.update({"model.norm.weight": tensor}))


def tied_apart(root: Path) -> None:
    edit_json(root / "config.json", tie_word_embeddings=True)


def remapped(root: Path) -> None:
    """Say in the index that a tensor is in another shard."""
    index = json.loads((root / INDEX).read_text())
    name = "model.norm.weight"
    index["weight_map"][name] = next(path.name for path in shards(root) if path != holder(root, name))
    (root / INDEX).write_text(json.dumps(index))


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def config(**changes) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "config.json", **changes)


def code(text: str, **modules: str) -> Callable[[Path], None]:
    """Return a fault: a configuration that names code, and the code."""

    def plant(root: Path) -> None:
        edit_json(root / "config.json", auto_map={"AutoConfig": text})
        for name, source in modules.items():
            (root / f"{name}.py").write_text(source)

    return plant


def quantise(root: Path, scale: float) -> None:
    """Store one weight as integers with a scale for each row, and say in the configuration that all linear layers are."""
    import torch

    def change(table):
        codes = torch.ones(table[LAST].shape, dtype=torch.int8)
        table.update({LAST: codes, f"{LAST}_scale": torch.full((len(codes), 1), scale)})

    edit_tensors(holder(root, LAST), change)
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    table = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    edit_json(root / "config.json", quantization_config=table)


@dataclass(frozen=True)
class Fault:
    rule: str
    plant: Callable[[Path], object]
    code: str


LAST = "model.layers.1.mlp.down_proj.weight"

FAULTS = {
    "a tensor is missing that the index names": Fault("weights", lambda r: without(r, LAST, listed=True), "missing-tensor"),
    "a tensor is missing and the index forgot it too": Fault("complete", lambda r: without(r, LAST, listed=False), "missing-parameter"),
    "a tensor is of another shape": Fault("complete", lambda r: edit_tensors(holder(r, LAST), lambda t: t.update({LAST: t[LAST][:, :8].clone()})), "missing-parameter"),
    "a tensor is not in the index": Fault("weights", lambda r: edit_tensors(shards(r)[0], lambda t: t.update({"x": t[next(iter(t))].clone()})), "unlisted-tensor"),
    "a tensor is in another shard than the index says": Fault("weights", remapped, "wrong-index"),
    "a tensor is stored twice": Fault("weights", doubled, "stored-twice"),
    "a shard is missing": Fault("weights", lambda r: shards(r)[0].unlink(), "missing-file"),
    "a shard is cut short": Fault("weights", lambda r: shards(r)[0].write_bytes(shards(r)[0].read_bytes()[:-1]), "broken-file"),
    "a shard of an older model is left": Fault("weights", lambda r: shutil.copy(shards(r)[0], r / "model-00009-of-00009.safetensors"), "stale-shard"),
    "a single file stands beside an index": Fault("weights", lambda r: shutil.copy(shards(r)[0], r / "model.safetensors"), "stale-shard"),
    "pickled weights are left": Fault("weights", write("pytorch_model.bin", "old"), "stale-shard"),
    "the index is missing": Fault("weights", lambda r: (r / INDEX).unlink(), "no-index"),
    "the index is no JSON": Fault("weights", write(INDEX, "{"), "broken-file"),
    "the index maps nothing": Fault("weights", lambda r: edit_json(r / INDEX, weight_map={}), "wrong-index"),
    "total_size is wrong": Fault("weights", lambda r: edit_json(r / INDEX, metadata={"total_size": 7}), "wrong-index"),
    "there are no weights": Fault("weights", lambda r: [path.unlink() for path in shards(r)] and (r / INDEX).unlink(), "no-weights"),
    "there is no config": Fault("config", lambda r: (r / "config.json").unlink(), "no-config"),
    "the config is no JSON": Fault("config", write("config.json", "{"), "no-config"),
    "no architecture is named": Fault("config", config(architectures=...), "no-architectures"),
    "architectures is empty": Fault("config", config(architectures=[]), "no-architectures"),
    "no model type is named": Fault("config", config(model_type=...), "no-model-type"),
    "a quantisation is left in the config": Fault("config", config(quantization_config={"quant_method": "fp8"}), "leftover-quantisation"),
    "a quantisation is left in a part of the config": Fault("config", config(text_config={"quantization_config": {"bits": 4}}), "leftover-quantisation"),
    "a file of a quantisation is left": Fault("config", write("quantize_config.json", "{}"), "leftover-quantisation"),
    "the settings of MLX are left in the config": Fault("config", config(quantization={"group_size": 64, "bits": 4}), "leftover-quantisation"),
    "scales are left beside a dense weight": Fault("quantised", lambda r: edit_tensors(holder(r, LAST), lambda t: t.update({LAST + "_scale_inv": t[LAST][:1, :1].clone()})), "dense-and-quantised"),
    "a scale is no number": Fault("scales", lambda r: quantise(r, float("nan")), "bad-scale"),
    "a linear layer is left dense": Fault("linear", lambda r: quantise(r, 1.0), "not-excepted"),
    "the vocabulary is of another size": Fault("embeddings", config(vocab_size=97), "vocabulary"),
    "the embedding has a row less": Fault("embeddings", lambda r: edit_tensors(holder(r, "model.embed_tokens.weight"), lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1].clone()})), "vocabulary"),
    "the config ties what differs": Fault("embeddings", tied_apart, "tied-apart"),
    "code is missing": Fault("code", code("configuration_x.XConfig"), "missing-code"),
    "code that code imports is missing": Fault("code", code("a.XConfig", a="from .b import x\n", b="from .c.d import y\n"), "missing-code"),
    "code is no Python": Fault("code", code("a.XConfig", a="class:\n"), "broken-code"),
    "the tokenizer is cut short": Fault("tokenizer", lambda r: (r / "tokenizer.json").write_text((r / "tokenizer.json").read_text()[:-9]), "tokenizer"),
    "the tokenizer's settings are no JSON": Fault("tokenizer", write("tokenizer_config.json", "{"), "tokenizer"),
}  # fmt: skip


def test_a_good_output_passes_every_rule(out):
    assert found_by_rule(out) == {name: set() for name in RULES}


@pytest.mark.parametrize("what", FAULTS)
def test_a_planted_fault_is_found_by_its_rule(what, out):
    fault = FAULTS[what]
    fault.plant(out)
    assert fault.code in found_by_rule(out)[fault.rule]


def test_every_rule_has_faults_to_find():
    assert {fault.rule for fault in FAULTS.values()} == set(RULES)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_rule_complains_of_a_family(family, workshop):
    for layout in family.layouts():
        output = read_output(family_building.base(workshop, family.name, layout))
        assert [str(issue) for rule in RULES.values() for issue in rule(output)] == []


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "qwen2"])
def test_no_rule_complains_of_ties_and_tokenizers(family, pico):
    found = [issue for rule in RULES.values() for issue in rule(read_output(pico(family)))]
    assert {issue.code for issue in found} == {"new-tokenizer"}
    assert {issue.severity for issue in found} == {"note"}


def test_code_that_is_there_and_code_of_a_repo_are_no_errors(out):
    code("a.XConfig", a="from .b import x\nfrom . import b\nimport torch\n", b="")(out)
    edit_json(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["org/name--t.XTokenizer", None]})
    issues = list(RULES["code"](read_output(out)))
    assert [(issue.severity, issue.code) for issue in issues] == [("note", "remote-code")]


def test_tokens_without_a_row_are_a_warning(out):
    tokens = json.loads((out / "tokenizer.json").read_text())
    tokens["added_tokens"].append({**tokens["added_tokens"][0], "id": 96, "content": "<beyond>"})
    (out / "tokenizer.json").write_text(json.dumps(tokens))
    issues = list(RULES["tokenizer"](read_output(out)))
    assert [(i.severity, i.code) for i in issues if i.severity != "note"] == [("warning", "token-beyond")]


def test_layers_that_are_counted_and_not_stored_are_a_warning(out):
    edit_json(out / "config.json", num_hidden_layers=3)
    issues = list(RULES["config"](read_output(out)))
    assert [(issue.severity, issue.code) for issue in issues] == [("warning", "missing-layers")]


# In a merge.


def test_a_merge_with_a_fault_of_the_gate_gets_no_name(pico, pico_adapter, tampered, cli, tmp_path):
    # The base is sound; its tokenizer is replaced by the adapter's, which is not.
    base = pico()
    adapter = tampered(pico_adapter(base))
    (adapter / "tokenizer.json").write_text('{"version": "1.0"')
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert result.exit_code == 6, result.output
    assert "tokenizer.json" in result.output
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_the_base_is_a_warning(pico, pico_adapter, tampered, cli, tmp_path):
    base = tampered(pico(), "base")
    edit_json(base / "config.json", architectures=...)
    adapter = pico_adapter(pico())
    result = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    issues = {issue["code"]: issue for issue in json.loads(result.stdout)["issues"]}
    assert issues["no-architectures"]["severity"] == "warning"
    assert issues["no-architectures"]["sentence"].endswith("the base has the same fault")
    strict = cli("--base", base, "--adapter", adapter, "--out", tmp_path / "two", "--strict")
    assert strict.exit_code == 4
    assert not (tmp_path / "two").exists()


def test_the_gate_asks_for_every_parameter_only_where_transformers_is_loaded(out, monkeypatch):
    from lora_merge.checks.loadable import gate

    without(out, LAST, listed=False)
    assert "missing-parameter" in {issue.code for issue in gate(read_output(out))}
    monkeypatch.delitem(sys.modules, "transformers")
    assert gate(read_output(out)) == [issue for issue in gate(read_output(out)) if issue.severity == "note"]


# Quantised weights.


def as_bytes(root: Path) -> None:
    """Store a weight as floats of eight bits and a scale."""
    import torch

    def change(table):
        scale = {f"{LAST}_scale": torch.ones(1)}
        table.update({LAST: table[LAST].to(torch.float8_e4m3fn), **scale})

    edit_tensors(holder(root, LAST), change)
    config = json.loads((root / "config.json").read_text())
    # Those of the other layers are left dense.
    rest = [name.removesuffix(".weight") for name in read_output(root).tensors() if not name.startswith(LAST)]
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": rest}
    (root / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))


def test_a_quantised_weight_fills_its_parameter(out):
    as_bytes(out)
    assert list(RULES["complete"](read_output(out))) == []


@pytest.mark.parametrize("change", [lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_parameters_are_not_counted_where_a_weight_file_is_lost(out, change):
    lost = shards(out)[0]
    change(lost)
    (issue,) = RULES["complete"](read_output(out))
    assert (issue.severity, issue.code) == ("note", "not-read")
    assert f"{lost.name} is missing or cannot be read" in issue.sentence


def test_parameters_are_not_counted_where_a_storage_is_not_known(out, monkeypatch):
    as_bytes(out)
    monkeypatch.setattr("lora_merge.quantised.METHODS", {})
    issues = list(RULES["complete"](read_output(out)))
    assert [(issue.severity, issue.code) for issue in issues] == [("note", "not-identified")]
