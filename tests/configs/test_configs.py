"""Every file in configs/, run as a user runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = Path("models/Llama-3-8B")
RUNS = ("my-lora/checkpoint-500", "other-lora/checkpoint-500", "other-lora/checkpoint-1000")

COMMANDS = {
    "merge.yaml": ["--config"],
    "merge-float16.yaml": ["--config"],
    "batch.yaml": ["batch"],
    "batch-matrix.yaml": ["batch"],
    "convert-for-engines.yaml": ["batch"],
}
"""How each is run; the one for make has tests of its own below."""

OUTPUTS = {
    "merge.yaml": {"merged/my-llama"},
    "merge-float16.yaml": {"merged/my-llama-fp16"},
    "batch.yaml": {"merged/my-lora-500", "merged/other-lora-500", "merged/other-lora-1000", "merged/both"},
    "batch-matrix.yaml": {
        "merged/my-llama-bfloat16", "merged/my-llama-float16", "merged/my-llama-0.5", "merged/my-llama-1.5",
    },
    "convert-for-engines.yaml": {f"adapters/my-lora-{name}" for name in ("vllm", "lmdeploy", "sglang", "gguf")},
}  # fmt: skip


def test_every_file_is_run_by_a_test():
    assert {path.name for path in CONFIGS.iterdir()} == {*COMMANDS, "lora-merge.mk"}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_example_runs_where_its_models_are(name, pico, pico_adapter, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pico(), BASE)
    for run in RUNS:
        shutil.copytree(pico_adapter(pico()), Path("runs", run))

    result = cli(*COMMANDS[name], CONFIGS / name)

    assert result.exit_code == 0, result.output
    written = {
        path.parent.as_posix() for folder in ("merged", "adapters") for path in Path(folder).glob("*/*.json")
    }
    assert written == OUTPUTS[name]


def test_paths_in_examples_are_no_ones_own():
    for path in CONFIGS.glob("*.yaml"):
        assert "/home" not in path.read_text()
        assert yaml.safe_load(path.read_text())


TRAIN = """\
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

data, base, out = sys.argv[1:]
torch.manual_seed(0)
tokens = torch.tensor([[ord(letter) % 90 + 3 for letter in open(data).read()[:32]]])
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(3):
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)
"""

MAKEFILE = """\
BASE := base
include {fragment}
all: merged/style merged/facts
adapters/%/adapter_config.json adapters/%/adapter_model.safetensors: data/%.txt
\t{python} train.py $< $(BASE) adapters/$*
"""


@pytest.fixture
def pipeline(pico, tmp_path):
    """Return a function that runs make in a training pipeline: its targets and options → the finished process."""
    shutil.copytree(pico("llama", "float32"), tmp_path / "base")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "data").mkdir()
    for name in ("style", "facts"):
        (tmp_path / "data" / f"{name}.txt").write_text(f"{name}: all that there is to be learned")
    makefile = MAKEFILE.format(fragment=CONFIGS / "lora-merge.mk", python=sys.executable)
    assert len(makefile.splitlines()) == 5
    (tmp_path / "Makefile").write_text(makefile)

    def make(*arguments):
        command = f"LORA_MERGE={sys.executable} -m lora_merge"
        return subprocess.run(
            ["make", command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return make


def test_five_lines_train_merge_and_verify_and_do_nothing_when_nothing_changed(pipeline, tmp_path):
    first = pipeline("merged/style")

    assert first.returncode == 0, first.stderr
    assert "verified: nothing differs" in first.stdout
    merged = tmp_path / "merged" / "style"
    assert (merged / "model.safetensors").is_file()
    assert (
        tmp_path / "adapters" / "style" / "adapter_model.safetensors"
    ).is_file()  # not removed as intermediate
    before = {path.name: path.stat().st_mtime_ns for path in merged.iterdir()}

    again = pipeline("merged/style")

    assert again.returncode == 0
    assert "is up to date" in again.stdout
    assert {path.name: path.stat().st_mtime_ns for path in merged.iterdir()} == before


def test_what_changed_is_trained_and_merged_again_and_nothing_else(pipeline, tmp_path):
    assert pipeline("-j2").returncode == 0
    before = {
        name: (tmp_path / "merged" / name / "model.safetensors").read_bytes() for name in ("style", "facts")
    }
    facts = (tmp_path / "merged" / "facts" / "merge_manifest.json").stat().st_mtime_ns
    (tmp_path / "data" / "style.txt").write_text("something else altogether, and as long as before")

    again = pipeline("all")

    assert again.returncode == 0, again.stderr
    assert (tmp_path / "merged" / "style" / "model.safetensors").read_bytes() != before["style"]
    assert (tmp_path / "merged" / "facts" / "merge_manifest.json").stat().st_mtime_ns == facts


def test_a_broken_adapter_fails_and_leaves_no_output(pipeline, tmp_path):
    (tmp_path / "train.py").write_text(
        TRAIN.replace(
            "model.save_pretrained(out)",
            "model.save_pretrained(out); open(out + '/adapter_config.json', 'w').write('{')",
        )
    )

    failed = pipeline("merged/style")

    assert failed.returncode != 0
    assert "is not valid JSON" in failed.stderr
    assert not (tmp_path / "merged").exists()


def test_what_fails_its_verification_loses_its_name(pipeline, tmp_path):
    failed = pipeline("merged/style", "VERIFY_FLAGS=--adapter nowhere")

    assert failed.returncode != 0
    assert not (tmp_path / "merged" / "style").exists()
    assert (tmp_path / "merged" / "style.rejected" / "model.safetensors").is_file()
    assert pipeline("merged/style").returncode == 0


def test_an_adapter_is_converted_for_an_engine(pipeline, tmp_path):
    first, again = pipeline("converted/style-vllm"), pipeline("converted/style-vllm")

    assert first.returncode == again.returncode == 0, first.stderr
    assert (tmp_path / "converted" / "style-vllm" / "adapter_model.safetensors").is_file()
    assert "is up to date" in again.stdout
