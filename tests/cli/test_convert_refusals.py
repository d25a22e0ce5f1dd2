"""What convert cannot do: a sentence of its own, what helps, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_merge.cli import exits
from tests.parity import building
from tests.parity.kinds import KINDS
from tests.tampering import edit_json, edit_tensors


@dataclass
class Case:
    """One conversion that is refused."""

    name: str
    options: tuple[object, ...]
    says: tuple[str, ...]
    kind: str = "LoRA"
    """Of the adapter, by its name in `KINDS`."""
    model: str = "llama"
    with_base: bool = True
    change: Callable[[Path], None] | None = None
    """What is done to the adapter first."""
    code: int = exits.PLAN


def replicate(adapter: Path) -> None:
    edit_json(adapter / "adapter_config.json", layer_replication=[[0, 2], [1, 2]])

    def repeat(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()

    edit_tensors(adapter / "adapter_model.safetensors", repeat)


def vision_beside(adapter: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(64)}, adapter / "vit.safetensors", {"format": "pt"})


CASES = (
    Case("a method without factors", ("--bake-scale",), ("a LOHA adapter has no LoRA factors", "--to-lora"), kind="LoHa"),
    Case("a change taken apart, and nobody said how far", ("--to-lora",), ("have no factors", "--rank N or --energy SHARE"), kind="LoHa"),
    Case("a lower rank for DoRA", ("--rank", 2), ("is DoRA", "--to-lora makes plain LoRA"), kind="DoRA on a linear layer"),
    Case("an initialisation that changed the base", ("--bake-scale",), ("PiSSA changed the base before training", "--base-is"), kind="PiSSA on the residual base", with_base=False, change=lambda adapter: edit_json(adapter / "adapter_config.json", init_lora_weights="pissa")),
    Case("a rank that does not hold all", ("--pad-rank", 2), ("pad_rank: is 2", "has rank 4", "add --rank 2"), code=exits.USAGE),
    Case("a format that the engine does not read", ("--for", "vllm", "--format", "mlx"), ("format: is mlx, but vLLM reads peft", "leave out --format or --for"), code=exits.USAGE),
    Case("a format for MLX, and llama.cpp", ("--for", "llamacpp", "--format", "mlx"), ("format: is mlx, but llama.cpp reads gguf",), code=exits.USAGE),
    Case("whole modules in MLX", ("--format", "mlx"), ("is saved whole", "format mlx"), kind="modules_to_save"),
    Case("DoRA in MLX", ("--format", "mlx"), ("has DoRA", "format mlx"), kind="DoRA on a linear layer"),
    Case("repeated layers under other names", ("--rename", "v4"), ("repeats layers of the base",), change=replicate),
    Case("whole parameters in a file beside", ("--bake-scale",), ("is a whole parameter in a second file", "merge it"), change=vision_beside),
    Case("biases as LoRA", ("--to-lora", "--rank", 4), ("LoRA can change matrices only",), kind='bias="lora_only"', model="llama_biased"),
    Case("norms as LoRA", ("--to-lora", "--rank", 4), ("LoRA can change matrices only",), kind="LayerNorm tuning"),
    Case("a larger vocabulary as LoRA", ("--to-lora", "--rank", 4), ("LoRA cannot resize",), kind="a larger vocabulary"),
    Case("experts that are stored stacked, one by one", ("--split-experts",), ("is one tensor in the base", "stores each expert separately"), kind="LoRA on stacked experts (target_parameters), two parameters", model="granitemoe"),
    Case("a module with a part of a parameter, named as transformers 5 does", ("--rename", "v5"), ("does not have a separate name", "--fuse-experts"), kind="EXPERTS", model="qwen3_moe"),
    Case("only trained tokens", ("--bake-scale",), ("has no module that a LoRA can be written for",), kind="trainable tokens alone"),
    Case("attention that PEFT changes twice", ("--bake-scale",), ("nn.MultiheadAttention",), kind="LoRA on nn.MultiheadAttention", model="siglip"),
    Case("biases for vLLM", ("--for", "vllm"), ("vLLM says that adapter bias is not supported", "merge it"), kind='bias="lora_only"', model="llama_biased"),
)  # fmt: skip


def kind_named(name):
    return next((kind for kind in KINDS if kind.name == name), None)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_conversion_is_refused_with_its_own_sentence(case, cli, tampered, tmp_path_factory, tmp_path):
    workshop = tmp_path_factory.getbasetemp() / "refused"
    if case.kind == "EXPERTS":
        base, adapter = experts_one_by_one(workshop, tmp_path)
    else:
        made = building.case(workshop, kind_named(case.kind), case.model, "float32")
        base, adapter = made.base, tampered(made.adapter)
    if case.change:
        case.change(adapter)
    base_options = ("--base", base) if case.with_base else ()

    result = cli("convert", adapter, *case.options, *base_options, "--out", tmp_path / "out", "--json")

    assert result.exit_code == case.code, result.output
    for words in case.says:
        assert words in result.stderr
    assert json.loads(result.stdout[result.stdout.index("{") :])["ok"] is False
    assert not list(tmp_path.glob("out*"))


def experts_one_by_one(workshop, tmp_path):
    """Return a Qwen3-MoE as it is published, and an adapter of its first expert."""
    import torch
    from safetensors.torch import save_file

    base = building.base(workshop, "qwen3_moe", "float32")
    stem = "base_model.model.model.layers.0.mlp.experts.0.up_proj"
    adapter = tmp_path / "experts"
    adapter.mkdir()
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 64), f"{stem}.lora_B.weight": torch.randn(40, 4)}
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["layers.0.mlp.experts.0.up_proj"],
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def test_an_output_that_exists_is_left_alone(pico, pico_adapter, cli, tmp_path):
    adapter = pico_adapter(pico())
    assert cli("convert", adapter, "--bake-scale", "--out", tmp_path / "out").exit_code == 0
    before = (tmp_path / "out" / "adapter_config.json").read_bytes()

    again = cli("convert", adapter, "--rank", 2, "--out", tmp_path / "out")

    assert again.exit_code == exits.WRITE
    assert "--overwrite" in again.stderr
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == before
    assert cli("convert", adapter, "--rank", 2, "--out", tmp_path / "out", "--overwrite").exit_code == 0
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() != before


def test_a_directory_of_something_else_is_not_overwritten(pico, pico_adapter, cli, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")

    result = cli("convert", pico_adapter(pico()), "--out", tmp_path / "out", "--overwrite")

    assert result.exit_code == exits.WRITE
    assert "already exists and is not an adapter" in result.stderr
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_the_adapter_itself_is_no_place_for_the_output(pico, pico_adapter, tampered, cli):
    adapter = tampered(pico_adapter(pico()))

    result = cli("convert", adapter, "--out", adapter, "--overwrite")

    assert result.exit_code == exits.WRITE
    assert "contains the input" in result.stderr


@pytest.mark.parametrize(
    ("options", "rank", "is_told"),
    [
        (("--rank", 64), 4, True),
        (("--rank", 64, "--for", "vllm"), 4, True),
        (("--rank", 64, "--pad-rank", 64), 64, False),
        (("--rank", 4), 4, False),
        (("--rank", 2), 2, False),
    ],
)
def test_a_rank_is_a_limit_and_one_that_no_module_reaches_is_said_so(
    options, rank, is_told, pico, pico_adapter, cli, tmp_path
):
    result = cli("convert", pico_adapter(pico()), *options, "--out", tmp_path / "out", "--json")

    assert result.exit_code == exits.OK, result.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == rank
    told = f"note: rank: is 64, a limit that changed nothing: the largest rank of a module is {rank}"
    assert (told in result.stderr) == is_told
    assert ("--pad-rank 64" in result.stderr) == is_told
    codes = [issue["code"] for issue in json.loads(result.stdout)["issues"]]
    assert ("rank-kept" in codes) == is_told


@pytest.mark.parametrize("place", ["merged", "deep/er/merged"])
def test_no_output_is_written_into_an_input(place, pico, pico_adapter, tampered, cli):
    adapter, base = tampered(pico_adapter(pico())), tampered(pico(), "base")

    conversion = ("convert", adapter, "--base", base, "--out", base / place)
    merges = [("--base", base, "--adapter", adapter, "--out", root / place) for root in (base, adapter)]
    for command in (conversion, *merges):
        out = command[-1]
        result = cli(*command)

        assert result.exit_code == exits.WRITE
        assert "is inside the input" in result.stderr
        assert not out.exists()


def test_the_same_conversion_writes_the_same_bytes(pico, pico_adapter, cli, tmp_path):
    adapter = pico_adapter(pico(), use_dora=True)
    for name in ("one", "other"):
        options = ("--to-lora", "--rank", 6, "--base", pico())
        assert cli("convert", adapter, *options, "--out", tmp_path / name).exit_code == 0

    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file.name
