"""The smaller benchmarks run, and what a command imports is bounded."""

from __future__ import annotations

import re

import pytest
from benchmarks import machines, parallel_copy, startup
from click.testing import CliRunner

from lora_merge.native.library import library
from tests.scripts.test_bench import bench  # noqa: F401 - a fixture

QUICK = ("--settle", "0", "--rounds", "1", "--size", "0.005")
NEVER = {
    "transformers",
    "peft",
    "accelerate",
    "scipy",
    "pandas",
    "sympy",
    "ray",
    "boto3",
    "obstore",
    "modelscope",
}
"""What a merge between folders of this machine has no use for."""


@pytest.mark.parametrize("words", [["--version"], ["--help"]], ids=str)
def test_help_and_version_import_nothing_heavy(words):
    found = startup.started(*words)
    assert not set(found.heavy) - {"rich"}
    assert len(found.modules) < 400


def test_a_merge_plans_before_torch_and_imports_no_library_that_it_does_not_use(pico, pico_adapter, tmp_path):
    base = pico()
    places = ("--base", base, "--adapter", pico_adapter(base, use_dora=True), "--out", tmp_path / "out")
    found = startup.started(*map(str, places), "--quiet")
    assert not NEVER & set(found.heavy)
    # Torch is loaded while the copies run, so everything that plans comes before it.
    torch = found.first("torch")
    assert torch is not None
    assert found.modules.index("lora_merge.merging.writing") < torch
    assert found.modules.index("lora_merge.planning") < torch


@pytest.mark.skipif(library() is None, reason="the compiled loops are not built here")
def test_a_merge_of_a_plain_lora_imports_little(pico, pico_adapter, tmp_path):
    base = pico("llama", "bfloat16", "40KB")
    places = ("--base", base, "--adapter", pico_adapter(base), "--out", tmp_path / "out")
    found = startup.started(*map(str, places), "--quiet")
    assert not set(found.heavy) - {"numpy", "rich", "yaml"}
    assert len(found.modules) < 1000


def test_a_parallel_copy_has_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel_copy, "RANGE_BYTES", 1000)
    monkeypatch.setattr(parallel_copy, "BLOCK_BYTES", 300)
    (tmp_path / "from").mkdir()
    for n in (0, 1, 999, 1000, 12_345):
        (tmp_path / "from" / str(n)).write_bytes(bytes(k * 7 % 251 for k in range(n)))
    parallel_copy.main(tmp_path / "from", tmp_path / "to", 3)
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "from").iterdir()
    }


@pytest.mark.system
@pytest.mark.slow
def test_stages_of_tiny_bases_are_measured(bench, tmp_path):  # noqa: F811
    run = CliRunner().invoke(bench.main, ["stages", *QUICK, "--cache-dir", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert re.search(r"round 1: bf16, nearest \d+\.\d\d s", run.output)


@pytest.mark.system
@pytest.mark.slow
def test_a_machine_is_measured_in_two_tables(bench, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(machines, "_has_gpu", lambda: False)
    file = tmp_path / "tables.md"
    words = ["machines", *QUICK, "--cache-dir", str(tmp_path), "--out", str(file)]
    run = CliRunner().invoke(bench.main, words)
    assert run.exit_code == 0, run.output
    text = file.read_text()
    assert machines.NO_GPU in text
    for name in (
        "cp -r",
        "copy by 2 threads",
        "LoRA, --workers 1",
        "LoRA, default",
        *(f"{one}, cpu" for one in machines.HEAVY),
    ):
        assert re.search(rf"\| {re.escape(name)} \| \d+\.\d\d \|", text), name
    late = CliRunner().invoke(bench.main, [*words, "--minutes", "0"])
    assert late.exit_code == 0, late.output
    assert "| cp -r | | | | no time was left |" in file.read_text()
