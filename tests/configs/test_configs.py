"""Every file in configs/, run as a user runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from lora_merge.serving import ENGINES

pytestmark = pytest.mark.system

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


@dataclass(frozen=True)
class Pipeline:
    """A directory with a Makefile that trains, merges and verifies."""

    root: Path

    def make(self, *arguments):
        """Return make's finished process."""
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    def command(self, *arguments):
        return ["make", f"LORA_MERGE={sys.executable} -m lora_merge", *arguments]

    def environment(self):
        """Return the environment without what a make that runs the tests has put there."""
        made = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
        return {key: value for key, value in os.environ.items() if key not in made}

    def would_run(self, *targets):
        """Return the commands that make would run."""
        process = self.make("--dry-run", *targets)
        assert process.returncode == 0, process.stderr
        return process.stdout

    def times(self, name):
        """Return when each file of an output was written."""
        return {path.name: path.stat().st_mtime_ns for path in (self.root / "merged" / name).iterdir()}

    def weights(self, name):
        return (self.root / "merged" / name / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def trained(pico, tmp_path_factory):
    """Return a pipeline of two names that has been run, and what make said; tests do not touch it."""
    root = tmp_path_factory.mktemp("pipeline")
    shutil.copytree(pico("llama", "float32"), root / "base")
    (root / "train.py").write_text(TRAIN)
    (root / "data").mkdir()
    for name in ("style", "facts"):
        (root / "data" / f"{name}.txt").write_text(f"{name}: all that there is to be learned")
    makefile = MAKEFILE.format(fragment=CONFIGS / "lora-merge.mk", python=sys.executable)
    assert len(makefile.splitlines()) == 5
    (root / "Makefile").write_text(makefile)
    pipeline = Pipeline(root)
    return pipeline, pipeline.make("-j2")


@pytest.fixture
def pipeline(trained, tmp_path):
    """Return a copy of the pipeline, every file as old as it was."""
    shutil.copytree(trained[0].root, tmp_path / "pipeline")
    return Pipeline(tmp_path / "pipeline")


def test_five_lines_train_merge_and_verify_two_names_at_a_time(trained):
    pipeline, process = trained

    assert process.returncode == 0, process.stderr
    assert process.stdout.count("verified: all checks passed") == 2
    for name in ("style", "facts"):
        assert set(pipeline.times(name)) >= {"model.safetensors", "merge_manifest.json"}
        assert (pipeline.root / "adapters" / name / "adapter_model.safetensors").is_file()  # not intermediate
    assert pipeline.weights("style") != pipeline.weights("facts")


def test_nothing_is_run_when_nothing_changed(pipeline):
    before = {name: pipeline.times(name) for name in ("style", "facts")}

    one, both = pipeline.make("merged/style"), pipeline.make("-j2", "merged/style", "merged/facts")

    assert one.stdout == "make: 'merged/style' is up to date.\n"
    assert both.stdout.count("is up to date") == 2
    assert one.stderr == both.stderr == ""
    assert {name: pipeline.times(name) for name in ("style", "facts")} == before


def test_what_changed_is_trained_and_merged_again_and_nothing_else(pipeline):
    before, facts = pipeline.weights("style"), pipeline.times("facts")
    (pipeline.root / "data" / "style.txt").write_text("something else altogether, and as long as before")

    again = pipeline.make("all")

    assert again.returncode == 0, again.stderr
    assert again.stdout.count("train.py") == 1
    assert pipeline.weights("style") != before
    assert pipeline.times("facts") == facts
    assert "is up to date" in pipeline.make("merged/style").stdout
    assert not list(pipeline.root.glob("merged/.*/*"))  # nothing is left of the way there


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_changed_base_is_merged_into_again_and_nothing_is_trained(file, pipeline):
    (pipeline.root / "base" / file).touch()

    commands = pipeline.would_run("all")

    assert commands.count("--adapter adapters/") == 2
    assert "train.py" not in commands


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_changed_file_of_an_adapter_is_merged_again(file, pipeline):
    (pipeline.root / "adapters" / "style" / file).touch()

    commands = pipeline.would_run("all")

    assert "--adapter adapters/style" in commands
    assert "--adapter adapters/facts" not in commands


def test_a_file_beside_an_output_changes_nothing(pipeline):
    (pipeline.root / "merged" / "style" / "notes.txt").write_text("served since Monday")

    assert "is up to date" in pipeline.make("merged/style").stdout


def test_an_output_that_lost_its_manifest_or_is_an_empty_directory_is_no_output(pipeline):
    (pipeline.root / "merged" / "style" / "merge_manifest.json").unlink()
    shutil.rmtree(pipeline.root / "merged" / "facts")
    (pipeline.root / "merged" / "facts").mkdir()

    commands = pipeline.would_run("merged/style", "merged/facts")

    assert "--adapter adapters/style" in commands
    assert "--adapter adapters/facts" in commands


def test_a_directory_that_is_no_output_is_left_alone(pipeline):
    shutil.rmtree(pipeline.root / "merged" / "style")
    (pipeline.root / "merged" / "style").mkdir()
    (pipeline.root / "merged" / "style" / "thesis.txt").write_text("the only copy")

    failed = pipeline.make("merged/style")

    assert failed.returncode != 0
    assert "merged/style" in failed.stderr
    assert (pipeline.root / "merged" / "style" / "thesis.txt").read_text() == "the only copy"


def test_a_broken_adapter_fails_and_leaves_no_output(pipeline):
    shutil.rmtree(pipeline.root / "merged")
    (pipeline.root / "adapters" / "style" / "adapter_config.json").write_text("{")

    failed = pipeline.make("merged/style")

    assert failed.returncode != 0
    assert "is not valid JSON" in failed.stderr
    assert not (pipeline.root / "merged").exists()


def test_what_fails_its_verification_gets_no_name_and_the_output_before_it_stays(pipeline):
    before = pipeline.times("style")
    (pipeline.root / "adapters" / "style" / "adapter_model.safetensors").touch()

    failed = pipeline.make("merged/style", "VERIFY_FLAGS=--adapter nowhere")

    assert failed.returncode != 0
    assert pipeline.times("style") == before
    assert (pipeline.root / "merged" / ".new" / "style" / "model.safetensors").is_file()

    again = pipeline.make("merged/style")

    assert again.returncode == 0, again.stderr
    assert pipeline.times("style")["merge_manifest.json"] > before["merge_manifest.json"]


def test_what_was_killed_before_it_was_verified_is_no_output(pipeline):
    root = pipeline.root
    shutil.rmtree(root / "merged" / "style")
    slow = root / "slow"
    slow.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = verify ]; then touch verifying; sleep 60; fi\n'
        f'exec {sys.executable} -m lora_merge "$@"\n'
    )
    slow.chmod(0o755)
    command = [*pipeline.command("merged/style"), f"LORA_MERGE={slow}"]
    with subprocess.Popen(
        command, cwd=root, env=pipeline.environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while process.poll() is None and not (root / "verifying").exists():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)

    assert (root / "merged" / ".new" / "style" / "merge_manifest.json").is_file()
    assert not (root / "merged" / "style").exists()
    assert "-m lora_merge verify merged/.new/style" in pipeline.would_run("merged/style")


def test_an_adapter_is_converted_for_an_engine_and_kept(pipeline):
    targets = ("converted/style-vllm", "converted/style-llamacpp")

    first, again = pipeline.make("-j2", *targets), pipeline.make(*targets)

    assert first.returncode == 0, first.stderr
    converted = {
        path.relative_to(pipeline.root / "converted").as_posix()
        for path in pipeline.root.glob("converted/*/*")
    }
    assert converted >= {
        "style-vllm/adapter_model.safetensors", "style-vllm/conversion.json",
        "style-llamacpp/adapter.gguf", "style-llamacpp/conversion.json",
    }  # fmt: skip
    assert again.stdout.count("is up to date") == 2

    (pipeline.root / "converted" / "style-vllm" / "conversion.json").unlink()

    assert "convert adapters/style --for vllm" in pipeline.would_run(*targets)


def test_every_engine_has_a_target(pipeline):
    commands = pipeline.would_run(*(f"converted/style-{engine}" for engine in ENGINES))

    assert all(f"convert adapters/style --for {engine} " in commands for engine in ENGINES)
