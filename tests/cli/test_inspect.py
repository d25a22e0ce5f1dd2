"""What inspect says of an adapter, alone and beside its base."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lora_merge.cli import exits
from tests import twins
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json, edit_tensors

TWINS = {"peft": lambda adapter, root: adapter, "ms-swift": twins.swift, "mlx": twins.mlx}


@pytest.fixture(scope="module")
def base(pico):
    return pico("llama", "float32")


@pytest.fixture
def found(cli):
    """Return a function that returns what inspect says as data."""

    def run(*arguments):
        result = cli("inspect", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


def by_path(document):
    return {module["path"]: module for module in document["modules"]}


def test_every_module_has_its_own_rank_and_scale(base, pico_adapter, found):
    adapter = pico_adapter(
        base, r=8, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 3}
    )

    modules = by_path(found(adapter))

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert modules.keys() == layers.keys()
    for path, layer in layers.items():
        assert modules[path]["rank"] == layer.r["default"]
        assert modules[path]["scale"] == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert modules[path]["shape"] == list(layer.base_layer.weight.shape)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_norms_beside_the_base_are_those_of_the_merged_weights(
    fields, base, pico_adapter, found, cli, tmp_path
):
    adapter = pico_adapter(base, **fields)
    assert cli("--base", base, "--adapter", adapter, "--out", tmp_path / "merged").exit_code == 0
    before, after = (load_file(root / "model.safetensors") for root in (base, tmp_path / "merged"))

    document = found(adapter, "--base", base)

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modules = by_path(document)
    assert {path.removesuffix(".weight") for path in modules if modules[path]["delta_norm"] is not None} >= {
        name.removesuffix(".weight") for name in changed
    }
    for name in changed:
        module = modules.get(name.removesuffix(".weight")) or modules[name]
        delta, weight = (after[name] - before[name]).double().norm(), before[name].double().norm()
        # the merged weight is rounded to float32, by at most 2⁻²⁴ of each value
        assert module["delta_norm"] == pytest.approx(float(delta), rel=1e-5)
        assert module["weight_norm"] == pytest.approx(float(weight), rel=1e-6)
        assert module["relative"] == pytest.approx(float(delta / weight), rel=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in KINDS
        if kind.group in {"other PEFT methods", "AdaLoRA"} and kind.setting == "plain" and not kind.needs
    ],
    ids=lambda kind: kind.name,
)
def test_every_kind_of_adapter_is_described(kind, found, tmp_path_factory):
    case = building.case(tmp_path_factory.getbasetemp() / "inspected", kind, kind.models[0], "float32")

    document = found(case.adapter)

    assert document["kind"] == kind.peft_type
    assert document["modules"]
    assert sum(module["nbytes"] for module in document["modules"]) == document["nbytes"] > 0
    assert {engine["verdict"] for engine in document["engines"]} == {"no"}
    assert not any(path["path"].startswith("base_model") for path in document["modules"])


@pytest.mark.parametrize("name", TWINS)
def test_every_format_is_read(name, base, pico_adapter, found, tmp_path):
    adapter = TWINS[name](pico_adapter(base), tmp_path / "twin")

    document = found(adapter)

    assert document["format"] == name
    assert {module["rank"] for module in document["modules"]} == {4}
    assert [engine["verdict"] for engine in document["engines"] if engine["engine"] == "vLLM"] == [
        "yes" if name == "peft" else "no"
    ]


@pytest.mark.parametrize(
    ("file", "content", "framework"),
    [
        ("args.json", '{"model": "Qwen/Qwen2-7B", "template": "qwen"}', "ms-swift"),
        ("README.md", "---\nlibrary_name: peft\ntags:\n- unsloth\n- trl\n---\n# x", "Unsloth"),
        ("README.md", "---\nlibrary_name: peft\ntags:\n- axolotl\n---\n", "Axolotl"),
        ("README.md", "---\nlibrary_name: peft\ntags:\n- llama-factory\n- lora\n---\n", "LLaMA-Factory"),
        ("README.md", "---\ntags:\n- base_model:adapter:x\n- sft\n- trl\n---\n", "TRL"),
        ("README.md", "---\nlibrary_name: peft\n---\nMade with love for unsloth and axolotl\n- trl\n", ""),
    ],
)
def test_the_trainer_is_recognised_by_what_it_leaves(
    file, content, framework, base, pico_adapter, tampered, found
):
    adapter = tampered(pico_adapter(base))
    (adapter / file).write_text(content)

    assert found(adapter)["framework"] == framework


def test_provenance_follows_an_adapter_through_a_conversion(base, pico_adapter, found, cli, tmp_path):
    adapter = pico_adapter(base)
    assert cli("convert", adapter, "--bake-scale", "--out", tmp_path / "out").exit_code == 0

    document = found(tmp_path / "out")

    assert document["provenance"]["converted"].endswith(f"from {adapter}: bake-scale")
    assert "conversion.json" in document["files"]


def test_the_table_groups_layers_and_full_lists_them(base, pico_adapter, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    adapter = pico_adapter(base, rank_pattern={"layers.0.self_attn.q_proj": 2})

    grouped, full = (cli("inspect", adapter, *options).stdout for options in ([], ["--full"]))

    assert "model.layers.0-1.self_attn.q_proj" in grouped
    assert "2 ×" in grouped
    assert "2 to 4" in grouped
    assert "model.layers.1.self_attn.q_proj" in full
    assert "0-1" not in full.split("Engines")[0]


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_a_plot_is_drawn(suffix, base, pico_adapter, cli, tmp_path):
    plot = tmp_path / f"plot.{suffix}"

    assert cli("inspect", pico_adapter(base), "--base", base, "--plot", plot).exit_code == 0

    assert plot.stat().st_size > 1000


def test_a_plot_of_another_kind_is_refused_before_anything_is_read(cli, tmp_path):
    result = cli("inspect", tmp_path / "nothing", "--plot", "plot.pdf")

    assert result.exit_code == exits.USAGE
    assert ".png, .svg or .html" in result.stderr


def test_an_adapter_with_a_fault_is_described_all_the_same(base, pico_adapter, tampered, cli):
    adapter = tampered(pico_adapter(base))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_tensors(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(name))

    result = cli("inspect", adapter)

    assert result.exit_code == exits.PLAN
    assert "model.layers.0.self_attn.q_proj: has lora_A and no lora_B" in result.stderr
    assert "down_proj" in result.stdout


def test_names_of_strangers_do_not_steer_the_terminal(base, pico_adapter, tampered, cli):
    adapter = tampered(pico_adapter(base))
    edit_json(
        adapter / "adapter_config.json", base_model_name_or_path="\x1b[31mred", revision="\x1b]0;title\x07"
    )

    assert "\x1b" not in cli("inspect", adapter).output


def test_an_embedding_on_vllm_depends_on_the_family_of_the_base(pico, pico_adapter, tampered, found):
    """Llama has LoRA on its embeddings there, Qwen2 has not; where the base is not known, nobody knows."""
    fields = {"target_modules": ["embed_tokens", "q_proj"]}
    effects = {}
    for family in ("llama", "qwen2"):
        adapter = tampered(pico_adapter(pico(family), **fields), family)
        for known in (True, False):
            if not known:
                unnamed = {"base_model_name_or_path": "org/model", "auto_mapping": None}
                edit_json(adapter / "adapter_config.json", **unnamed)
            (engine,) = found(adapter, "--engine", "vllm")["engines"]
            effects[family, known] = {one["trait"]: one["effect"] for one in engine["obstacles"]}.get(
                "embedding"
            )

    assert effects == {
        ("llama", True): None,
        ("qwen2", True): "refused",
        ("llama", False): "depends",
        ("qwen2", False): "depends",
    }


def test_the_head_that_was_saved_along_is_no_trained_module(base, pico_adapter, found):
    """PEFT saves an embedding beside its LoRA; with the base at hand it is seen to be a copy."""
    adapter = pico_adapter(base, target_modules=["embed_tokens", "q_proj"])

    document = found(adapter, "--base", base)

    assert any(
        issue["code"] == "full-tensor" and "equal to the base's" in issue["sentence"]
        for issue in document["issues"]
    )
