"""``lora-merge plan``: the plan without an output, and how one module was matched."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lora_merge.cli import exits
from tests.parity import building
from tests.parity.kinds import KINDS

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture
def experts(workshop):
    """A MoE base as published, its experts one by one, and an adapter of them all as stacks."""
    kind = next(kind for kind in KINDS if kind.name.endswith("(target_parameters), two parameters"))
    case = building.case(workshop, kind, "qwen3_moe", "float32")
    base = workshop / "one-by-one"
    if not base.exists():
        building.make("qwen3_moe").save_pretrained(base)
    return base, case.adapter


def test_a_plan_needs_no_output(cli, pico, pico_adapter):
    base = pico()
    result = cli("plan", "--base", base, "--adapter", pico_adapter(base))
    assert result.exit_code == exits.OK
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[0] == "Llama 68k, bf16 + LoRA r4 on 4 modules → dense bf16"
    assert "merged 4 tensors 36.9 kB" in lines
    assert "output" not in result.stdout


def test_an_adapter_that_is_given_twice_is_noted(cli, pico, pico_adapter):
    base, adapter = pico(), pico_adapter(pico())
    once = cli("plan", "--base", base, "--adapter", adapter)
    twice = cli("plan", "--base", base, "--adapter", adapter, "--adapter", f"{adapter}:0.5", "--strict")
    assert twice.exit_code == exits.OK
    assert f"note: {adapter}: is given 2 times" in twice.stderr
    assert "is given" not in once.stderr


def test_a_plan_is_data_too(cli, pico, pico_adapter):
    base = pico()
    data = json.loads(cli("plan", "--base", base, "--adapter", pico_adapter(base), "--json").stdout)
    assert (data["ok"], data["dry_run"], data["out"]) == (True, True, "")
    assert data["summary"]["n_merged"] == 4


@pytest.mark.parametrize("name", [Q, f"{Q}.weight"])
def test_explain_says_rule_tensor_and_change(cli, pico, pico_adapter, name):
    base = pico()
    adapter = pico_adapter(base)
    result = cli("plan", "--base", base, "--adapter", adapter, "--explain", name)
    assert result.exit_code == exits.OK
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines == [
        f"{Q}.weight",
        "rule identity: it is stored under its own name",
        f"tensor {Q}.weight of (64, 64), in model.safetensors",
        "change low_rank, rank 4, scale 1.5",
        f"adapter {adapter.resolve()}",
    ]


def test_explain_shows_every_part_of_a_stack(cli, experts):
    base, adapter = experts
    result = cli(
        "plan", "--base", base, "--adapter", adapter, "--explain", f"{EXPERTS}.gate_up_proj", "--json"
    )
    matches = json.loads(result.stdout)["matches"]
    assert {match["rule"] for match in matches} == {"converted"}
    places = {match["tensor"]: match["of_adapter"] for match in matches}
    assert places == {
        f"{EXPERTS}.{expert}.{half}_proj.weight": f"[{expert}, {rows}, 0:64]"
        for expert in range(4)
        for half, rows in (("gate", "0:40"), ("up", "40:80"))
    }


def test_explain_takes_the_name_on_disk_as_well(cli, experts):
    base, adapter = experts
    name = f"{EXPERTS}.2.up_proj"
    (match,) = json.loads(
        cli("plan", "--base", base, "--adapter", adapter, "--explain", name, "--json").stdout
    )["matches"]
    assert match["parameter"] == f"{EXPERTS}.gate_up_proj"
    assert match["tensor"] == f"{name}.weight"
    assert match["of_adapter"] == "[2, 40:80, 0:64]"


def test_explain_says_that_a_module_is_copied(cli, pico, pico_adapter):
    base = pico()
    result = cli("plan", "--base", base, "--adapter", pico_adapter(base), "--explain", "model.norm")
    assert "the adapter does not name it" in result.stdout
    assert "copied" in result.stdout


def test_a_name_that_is_nowhere_is_refused_with_the_nearest(cli, pico, pico_adapter):
    base = pico()
    result = cli(
        "plan", "--base", base, "--adapter", pico_adapter(base), "--explain", "model.layers.0.attn.q_proj"
    )
    assert result.exit_code == exits.USAGE
    assert "the adapter and the base have no module or parameter model.layers.0.attn.q_proj" in result.stderr
    assert f"did you mean {Q}" in result.stderr


@pytest.mark.parametrize("name", ["q_prj", "self_atn.q_proj"])
def test_the_end_of_a_name_is_answered_with_the_nearest(name, cli, pico, pico_adapter):
    base = pico()
    result = cli("plan", "--base", base, "--adapter", pico_adapter(base), "--explain", name)
    assert result.exit_code == exits.USAGE
    assert Q in result.stderr.splitlines()[1]


def test_a_name_that_is_like_no_other_is_answered_with_an_example(cli, pico, pico_adapter):
    base = pico()
    result = cli("plan", "--base", base, "--adapter", pico_adapter(base), "--explain", "zzz")
    assert result.stderr.splitlines()[1].startswith("hint: names are like model.")


def test_a_plan_without_an_adapter_says_so(cli, pico):
    result = cli("plan", "--base", pico())
    assert result.exit_code == exits.USAGE
    assert "missing option `--adapter`" in result.stderr


def test_explain_takes_the_adapters_own_name_of_a_method_of_pefts(workshop, cli, tmp_path):
    kind = next(kind for kind in KINDS if kind.name == "LoHa" or kind.peft_type == "LOHA")
    case = building.case(workshop, kind, kind.models[0], "float32")
    module = json.loads(cli("plan", "--base", case.base, "--adapter", case.adapter, "--json").stdout)[
        "summary"
    ]["kinds"]
    assert module == {"peft_layer": module["peft_layer"]}
    name = "model.layers.0.self_attn.q_proj"
    result = cli("plan", "--base", case.base, "--adapter", case.adapter, "--explain", name)
    assert "rule identity" in " ".join(result.stdout.split())
    assert "change peft_layer" in " ".join(result.stdout.split())


def test_a_plan_from_a_file_needs_no_output_either(cli, pico, pico_adapter, tmp_path):
    base = pico()
    path = tmp_path / "plan.yaml"
    path.write_text(f"base: {base}\nadapter: {pico_adapter(base)}\n")
    result = cli("plan", "--config", path)
    assert result.exit_code == exits.OK, result.output
    assert "4 tensors" in result.stdout


@pytest.mark.parametrize(
    ("combine", "is_told"), [("linear", True), ("svd", True), ("ties", False), ("dare_linear", False)]
)
def test_a_density_that_nothing_looks_at_is_a_warning(combine, is_told, cli, pico, pico_adapter):
    arguments = ("plan", "--base", pico(), "--adapter", pico_adapter(pico()), "--combine", combine)

    result = cli(*arguments, "--density", 0.3)

    told = f"warning: density: is 0.3, and --combine {combine} does not use it: it keeps all of each change"
    assert (told in result.stderr) == is_told
    assert "density" not in cli(*arguments).stderr


def test_names_and_shapes_tell_all_there_is_to_a_plain_lora_so_transformers_is_not_loaded(pico, pico_adapter):
    """Importing it takes longer than many a merge. The rules of engines are for `inspect` and `convert`."""
    script = (
        "import sys, lora_merge; lora_merge.plan(base=sys.argv[1], adapter=sys.argv[2]); "
        "print(*(name in sys.modules for name in ('transformers', 'torch', 'lora_merge.serving')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, pico(), pico_adapter(pico())],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["False", "False", "False"], run.stderr
