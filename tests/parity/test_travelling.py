"""Work that is done in other processes: the same bytes and the same records, for a dozen models of different kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

import lora_merge
from tests.filling import fill_all
from tests.parity import building
from tests.parity.kinds import KINDS

pytestmark = pytest.mark.system

CHOSEN = (
    ("LoRA", "llama", "bfloat16"),
    ("DoRA on Conv1D", "gpt2", "float32"),
    ("LoRA on a tied embedding", "llama_tied", "float16"),
    ("LoRA on stacked experts (target_parameters), two parameters", "gpt_oss", "bfloat16"),
    ("LoRA on stacked experts beside linear layers", "qwen3_moe", "float16"),
    ("DoRA on Conv2d", "resnet", "float32"),
    ("LoHa", "wav2vec2", "float32"),
    ("LoRA on nn.MultiheadAttention", "siglip", "float32"),
    ("IA³", "llama_biased", "bfloat16"),
    ("OFT", "llama", "float16"),
    ("VeRA", "gpt2", "float32"),
    ("trainable_token_indices", "llama", "bfloat16"),
    ("a larger vocabulary", "llama", "float32"),
    ("modules_to_save", "llama_tied", "bfloat16"),
)


def test_processes_write_the_bytes_of_the_serial_executor(tmp_path_factory, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    workshop = tmp_path_factory.mktemp("travelling")
    plans = {}
    for name, model, dtype in CHOSEN:
        kind = next(kind for kind in KINDS if kind.name == name)
        case = building.case(workshop, kind, model, dtype)
        options = {"allow_untie": True} if "tied" in model else {}
        plans[f"{name} {model}"] = lora_merge.plan(base=case.base, adapter=case.adapter, **options)
    places = {name: str(n) for n, name in enumerate(plans)}
    written, records = {}, {}
    for executor in ("serial", "processes"):
        (tmp_path / executor).mkdir()
        roots = {tmp_path / executor / places[name]: plan for name, plan in plans.items()}
        records[executor] = list(fill_all(roots, executor, 2).values())
        written[executor] = [
            {path.name: path.read_bytes() for path in sorted(root.iterdir())} for root in roots
        ]

    assert records["processes"] == records["serial"]
    for name, there, here in zip(plans, written["processes"], written["serial"], strict=True):
        assert there == here, name


def test_the_merges_of_this_suite_are_done_in_a_second_process(second_process, pico, pico_adapter, merged):
    before = second_process.n_pieces
    base = pico("llama", "bfloat16", "60KB")
    merged(base, pico_adapter(base))
    assert second_process.n_pieces > before


def test_a_merge_by_processes_is_the_merge_of_the_command(pico, pico_adapter, cli, tmp_path):
    base = pico("llama", "bfloat16", "60KB")
    arguments = ("--base", base, "--adapter", pico_adapter(base), "--verify", "full", "--workers", 2)
    for executor in ("auto", "processes"):
        out = tmp_path / executor / "out"
        result = cli(*arguments, "--out", out, "--executor", executor)
        assert result.exit_code == 0, result.output
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / executor / "out").iterdir()}
        for executor in ("auto", "processes")
    )
    assert one == other
