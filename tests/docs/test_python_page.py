"""The first example of docs/python.md prints what its functions return."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import lora_merge

PAGE = Path(lora_merge.__file__).parents[1] / "docs" / "python.md"


def test_the_first_example_runs_and_prints_what_is_true(pico, pico_adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = pico("llama")
    shutil.copytree(base, "Llama-3-8B")
    shutil.copytree(pico_adapter(base, r=32), "my-lora")
    example, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    said: dict[str, object] = {}

    exec(example, said)

    merged, proved, inspected, converted = capsys.readouterr().out.splitlines()
    assert merged == f"{said['report'].summary.n_merged} True"
    assert int(merged.split()[0]) > 0
    assert proved.startswith("True (")
    assert inspected.startswith("{32: ")
    assert "'vLLM': 'with an option'" in inspected  # of rank 32
    assert converted.startswith("Loss(norm=")
    assert (tmp_path / "merged" / "merge_manifest.json").exists()
    assert (tmp_path / "my-lora-vllm" / "adapter_config.json").exists()
