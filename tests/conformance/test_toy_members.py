"""A new member of a folder is one file and one line in that folder's table; the command then has it.

The files are those of `tests/toys`. Where more than the table has to change before a test passes, the member is not one line.
"""

from __future__ import annotations

import json

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_merge
from lora_merge.adapters import FORMATS
from lora_merge.cli import exits, main
from lora_merge.codecs import CODECS, ENCODERS
from lora_merge.deltas import ALGEBRAS
from lora_merge.executors import EXECUTORS
from lora_merge.layouts import LAYOUTS
from lora_merge.quantised import METHODS
from lora_merge.serving import ENGINES
from lora_merge.storage.destinations import STORAGES
from tests import twins
from tests.toys import adapter_format, codecs, layout
from tests.toys.algebra import Gain, stating_gains
from tests.toys.destination import Shelf
from tests.toys.engine import TOYSERVE
from tests.toys.executor import run_backwards

LINES = {
    "adapters": (FORMATS, "crate", adapter_format.CRATE),
    "codecs": (CODECS, "row_scaled", codecs.TOYS["row_scaled"][0]),
    "codecs that write": (ENCODERS, "row_scaled", codecs.TOYS["row_scaled"][0]),
    "quantised": (METHODS, "row_scaled", codecs.Toy(codecs.TOYS["row_scaled"][0])),
    "deltas": (ALGEBRAS, "gain", Gain),
    "executors": (EXECUTORS, "backwards", run_backwards),
    "layouts": (LAYOUTS, "underscored", layout.UNDERSCORED),
    "serving": (ENGINES, "toy", TOYSERVE),
    "storage": (STORAGES, "shelf", Shelf),
}
"""Folder → its table, and the line that a test adds to it. The other table of `storage` is tried in `test_storages.py`."""


@pytest.fixture
def add(monkeypatch):
    """Return a function that adds the toy of a folder."""
    return lambda folder: monkeypatch.setitem(*LINES[folder])


@pytest.fixture
def plain(tmp_path):
    """Return a function: names → a base of a family that transformers does not know, and tensors → the same base stored so."""

    def build(name, tensors):
        root = tmp_path / name
        root.mkdir()
        (root / "config.json").write_text('{"model_type": "of_nobody", "architectures": ["OfNobody"]}')
        save_file(tensors, root / "model.safetensors", {"format": "pt"})
        return root

    return build


def merged(root):
    return load_file(root / "model.safetensors")


def files_of(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("folder", LINES)
def test_without_its_line_a_toy_is_not_there(folder):
    table, key, _ = LINES[folder]
    assert key not in table


def test_an_adapter_format_is_merged_as_the_same_adapter_in_another_is(
    add, pico, pico_adapter, cli, tmp_path
):
    base, adapter = pico(), pico_adapter(pico())
    crate = adapter_format.pack(adapter, tmp_path / "crate")
    arguments = ("--base", base, "--adapter", crate, "--verify", "full", "--out", tmp_path / "out")
    assert cli(*arguments).exit_code == exits.RESOLVE

    add("adapters")
    done = cli(*arguments)

    assert done.exit_code == exits.OK, done.stderr
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "wanted").exit_code == exits.OK
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert cli("verify", tmp_path / "out").exit_code == exits.OK
    described = json.loads(cli("inspect", crate, "--json").stdout)
    assert described["format"] == "crate"
    assert {row["scale"] for row in described["modules"]} == {1.5}
    converted = cli("convert", crate, "--base", base, "--out", tmp_path / "converted")
    assert converted.exit_code == exits.OK, converted.stderr
    again = cli("--base", base, "--adapter", tmp_path / "converted", "--out", tmp_path / "again")
    assert again.exit_code == exits.OK, again.stderr
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "wanted" / "model.safetensors"
    ).read_bytes()


def test_an_adapter_format_is_named_where_no_format_is_found(add, pico, cli, tmp_path):
    add("adapters")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing of an adapter")
    refused = cli("--base", pico(), "--adapter", tmp_path / "other", "--out", tmp_path / "out")
    assert refused.exit_code == exits.RESOLVE
    assert adapter_format.CRATE.looked_for in refused.stderr


def test_a_codec_is_merged_and_written_as_it_is_stored(
    add, pico, pico_adapter, cli, plain, monkeypatch, tmp_path
):
    adapter, tensors = pico_adapter(pico()), merged(pico())
    coded = "model.layers.0.mlp.down_proj.weight"
    tensors |= codecs.stored_as("row_scaled", coded, tensors.pop(coded))
    base = plain("base", tensors)
    arguments = ("--base", base, "--adapter", adapter, "--out", tmp_path / "out")
    refused = cli(*arguments)
    assert refused.exit_code == exits.PLAN
    assert f"{coded}: is stored as I8, expected BF16, F16 or F32" in refused.stderr

    for folder in ("codecs", "codecs that write", "quantised"):
        add(folder)
    monkeypatch.setattr("lora_merge.planning.storing.WRITTEN_BY_DEFAULT", {"row_scaled"})
    done = cli(*arguments)

    assert done.exit_code == exits.OK, done.stderr
    assert "there is no second decoder for this storage" in done.stderr
    made = merged(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }
    config, factors = twins.load(adapter)
    a, b = (factors[f"{twins.PREFIX}{coded.removesuffix('weight')}lora_{role}.weight"] for role in "AB")
    wanted = codecs.values_in("row_scaled", coded, tensors) + config["lora_alpha"] / config["r"] * (b @ a)
    half_steps = codecs.scale_for(wanted.abs().amax(1, keepdim=True)) / 2
    got = codecs.values_in("row_scaled", coded, made)
    assert ((got - wanted).abs() <= half_steps + 1e-4).all()
    assert not torch.equal(made[coded], tensors[coded])


@pytest.mark.parametrize("options", [(), ("--combine", "ties")], ids=["linear", "ties"])
def test_an_algebra_is_merged_and_described(add, options, pico, pico_adapter, tmp_path, cli, monkeypatch):
    """Which deltas it has, a format states; here that of PEFT."""
    add("deltas")
    monkeypatch.setitem(FORMATS, "peft", stating_gains(FORMATS["peft"]))
    base, adapter = pico(), pico_adapter(pico())
    adapters = [part for n in range(2 if options else 1) for part in ("--adapter", f"{adapter}:{n + 1}")]
    result = cli("--base", base, *adapters, "--out", tmp_path / "out", *options)
    assert result.exit_code == exits.OK, result.output
    described = cli("inspect", adapter, "--base", base)
    assert described.exit_code == exits.OK, described.output
    assert "gain" in described.output
    if options:
        return
    before, after = merged(base), merged(tmp_path / "out")
    _, factors = twins.load(adapter)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed
    for name in changed:
        b = factors[f"{twins.PREFIX}{name.removesuffix('.weight')}.lora_B.weight"].float()
        assert after[name].equal((before[name].float() * b[:, 1:2]).to(before[name].dtype))


def test_an_executor_is_named_and_writes_the_same_bytes(add, pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "bfloat16", "60KB")
    arguments = ("--base", base, "--adapter", pico_adapter(base))
    refused = cli(*arguments, "--out", tmp_path / "none", "--executor", "backwards")
    assert refused.exit_code == exits.USAGE
    sentence = (
        "--executor': 'backwards' is not a known executor, expected auto, serial, threads, processes or ray"
    )
    assert sentence in refused.stderr

    add("executors")
    for name in ("auto", "backwards"):
        made = cli(*arguments, "--out", tmp_path / name / "out", "--executor", name)
        assert made.exit_code == exits.OK, made.stderr

    assert files_of(tmp_path / "auto" / "out") == files_of(tmp_path / "backwards" / "out")
    assert "--executor [auto|serial|threads|processes|backwards|ray]" in cli("merge", "--help").output


def test_a_layout_is_merged_and_explained_in_its_own_words(add, pico, pico_adapter, cli, plain, tmp_path):
    adapter, tensors = pico_adapter(pico()), merged(pico())
    plainly = plain("plainly", tensors)
    base = plain("base", {layout.stored_name(name): tensor for name, tensor in tensors.items()})
    arguments = ("--base", base, "--adapter", adapter)
    module = "model.layers.1.self_attn.q_proj"
    refused = cli(*arguments, "--out", tmp_path / "out")
    assert refused.exit_code == exits.PLAN
    assert "the base has none of the adapter's 4 modules" in refused.stderr

    add("layouts")
    done = cli(*arguments, "--out", tmp_path / "out", "--verify", "full")

    assert done.exit_code == exits.OK, done.stderr
    assert cli("--base", plainly, "--adapter", adapter, "--out", tmp_path / "wanted").exit_code == exits.OK
    made, wanted = merged(tmp_path / "out"), merged(tmp_path / "wanted")
    assert made.keys() == {layout.stored_name(name) for name in wanted}
    for name, tensor in wanted.items():
        assert made[layout.stored_name(name)].equal(tensor), name
    explained = cli("plan", *arguments, "--explain", module)
    assert explained.exit_code == exits.OK, explained.stderr
    assert f"underscored: {layout.UNDERSCORED.says}" in " ".join(explained.stdout.split())
    assert f"{layout.stored_name(f'{module}.weight')} of " in explained.stdout


def test_an_engine_is_reported_on_and_converted_for(add, pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "float32")
    adapter = pico_adapter(base, use_rslora=True)
    convert = ("convert", adapter, "--for", "toy", "--base", base, "--out", tmp_path / "out")
    for arguments in (("inspect", adapter, "--engine", "toy"), convert):
        refused = cli(*arguments)
        assert refused.exit_code == exits.USAGE
        assert "'toy' is not one of 'vllm', " in refused.stderr

    add("serving")

    def said(place, *options):
        found = json.loads(cli("inspect", place, "--base", base, "--json", *options).stdout)["engines"]
        return {one["engine"]: (one["verdict"], [o["trait"] for o in one["obstacles"]]) for one in found}

    assert said(adapter)["Toyserve"] == ("no", ["rslora"])
    assert said(adapter, "--engine", "toy") == {"Toyserve": ("no", ["rslora"])}
    done = cli(*convert)
    assert done.exit_code == exits.OK, done.stderr
    assert said(tmp_path / "out", "--engine", "toy") == {"Toyserve": ("yes", [])}
    for verb, flag in (("inspect", "--engine"), ("convert", "--for")):
        assert f"{flag} [{'|'.join(ENGINES)}]" in " ".join(cli(verb, "--help").output.split())
        (parameter,) = (one for one in main.commands[verb].params if flag in one.opts)
        completed = parameter.shell_complete(click.Context(main), "to")
        assert [item.value for item in completed] == ["toy"]


def test_an_engine_is_named_in_python_and_in_a_batch_file(add, pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "float32")
    adapter = pico_adapter(base, use_rslora=True)
    job = {"convert": str(adapter), "base": str(base), "for": "toy", "out": str(tmp_path / "batch")}
    (tmp_path / "jobs.yaml").write_text(json.dumps({"jobs": [job]}))
    sentence = "'toy' is not a known engine, expected vllm, lmdeploy, lorax, sglang, tgi or llamacpp"
    assert sentence in cli("batch", tmp_path / "jobs.yaml").stderr
    with pytest.raises(lora_merge.RequestError, match=sentence):
        lora_merge.inspect(adapter=adapter, engine="toy")

    add("serving")

    (report,) = lora_merge.inspect(adapter=adapter, base=base, engine="toy").engines
    assert report.verdict == "no"
    lora_merge.convert(adapter=adapter, base=base, engine="toy", out=tmp_path / "python")
    done = cli("batch", tmp_path / "jobs.yaml")
    assert done.exit_code == exits.OK, done.stderr
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("python", "batch")]
    assert weights[0] == weights[1]


def test_a_destination_gets_what_a_directory_gets(add, pico, pico_adapter, cli, monkeypatch, tmp_path):
    monkeypatch.setattr(Shelf, "root_of_all", tmp_path / "shelves")
    (tmp_path / "shelves").mkdir()
    base = pico("llama", "bfloat16", "30KB")
    arguments = ("--base", base, "--adapter", pico_adapter(base))

    add("storage")
    made = cli(*arguments, "--out", "shelf://merged")

    assert made.exit_code == exits.OK, made.stderr
    here = cli(*arguments, "--out", tmp_path / "merged")
    assert here.exit_code == exits.OK, here.stderr
    assert files_of(tmp_path / "shelves" / "merged") == files_of(tmp_path / "merged")
    weights = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert len(weights) > 1
    assert sorted((tmp_path / "shelves" / "arrived").read_text().split()) == weights
