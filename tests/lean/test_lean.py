"""A plain LoRA needs neither PEFT nor transformers nor accelerate: the same bytes without them, and they are not loaded.

`make lean` runs these tests with the interpreter of an environment that really lacks the three.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_merge.runtime.packages import PACKAGES
from tests.parity import family_building

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("without.py")
HEAVY = ("accelerate", "peft", "transformers")
pytestmark = pytest.mark.system

LEAN_PYTHON = os.environ.get("LORA_MERGE_LEAN_PYTHON", "")


def run(commands, *, hidden=(), python=sys.executable, paths=()):
    """Return what some commands did in one new process, in which packages are hidden."""
    job = {"hidden": list(hidden), "commands": [[str(part) for part in command] for command in commands]}
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [*map(str, paths), *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [python, SCRIPT],
        input=json.dumps(job),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_lean(commands):
    """Return what some commands did where the heavy packages cannot be imported."""
    if LEAN_PYTHON:
        return run(commands, python=LEAN_PYTHON)
    return run(commands, hidden=HEAVY)


@dataclass(frozen=True)
class Makers:
    """What makes the inputs of a case."""

    pico: Any
    pico_adapter: Any
    place: Path
    """A directory for what is made here."""

    def small(self, name="llama", shards=None, **fields):
        """Return a base of `tests.conftest` and one adapter for it."""
        base = self.pico(name, "bfloat16", shards)
        return base, (self.pico_adapter(base, **fields),)

    def family(self, name, naming, layout="published"):
        """Return a base of the parity suite and an adapter with the names of one era."""
        return (
            family_building.base(self.place, name, layout),
            (family_building.trained(self.place, name, naming).adapter,),
        )

    def pickled(self, directory, stem, name):
        """Return a copy of a directory in which the weights are a pickle of torch."""
        import torch
        from safetensors.torch import load_file

        copy = self.place / f"{directory.name}-pickled"
        if not copy.exists():
            shutil.copytree(directory, copy)
            torch.save(load_file(copy / f"{stem}.safetensors"), copy / name)
            (copy / f"{stem}.safetensors").unlink()
        return copy

    def base_in_bin(self):
        base, adapters = self.small()
        return self.pickled(base, "model", "pytorch_model.bin"), adapters

    def adapter_in_bin(self):
        base, (adapter,) = self.small()
        return base, (self.pickled(adapter, "adapter_model", "adapter_model.bin"),)

    def two(self):
        base = self.pico()
        return base, (self.pico_adapter(base), self.pico_adapter(base, r=2))


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

CASES = {
    "Llama": lambda makers: makers.small(),
    "Llama in shards, rsLoRA": lambda makers: makers.small(shards="40KB", use_rslora=True),
    "Llama with tied embeddings": lambda makers: makers.small("llama_tied"),
    "Qwen2, every linear layer": lambda makers: makers.small("qwen2", target_modules=LINEAR),
    "patterns of ranks": lambda makers: makers.small(
        rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}
    ),
    "DoRA": lambda makers: makers.small(use_dora=True),
    "a base in .bin": Makers.base_in_bin,
    "an adapter in .bin": Makers.adapter_in_bin,
    "Gemma 2": lambda makers: makers.family("Gemma 2", "transformers 5"),
    "Phi-3, fused projections": lambda makers: makers.family("Phi-3", "transformers 5"),
    "Mixtral, expert by expert": lambda makers: makers.family("Mixtral", "transformers 4"),
    "Gemma 3 with a tower, ms-swift": lambda makers: makers.family("Gemma 3", "ms-swift"),
    "T5": lambda makers: makers.family("T5", "transformers 5"),
    "two by TIES": Makers.two,
}
OPTIONS = {"two by TIES": ("--combine", "ties", "--density", "0.4")}


VERIFIED = ("Llama", "Gemma 2")

ONE_WORKER = ("--workers", "1")


def boft(makers):
    """Return a base, and an adapter of a kind that PEFT's own layers merge."""
    from peft import BOFTConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    root = makers.place / "boft"
    model = AutoModelForCausalLM.from_pretrained(makers.pico())
    get_peft_model(model, BOFTConfig(boft_block_size=4, target_modules=["q_proj"])).save_pretrained(root)
    return makers.pico(), root


def gpt2(makers):
    base = makers.pico("gpt2")
    return base, makers.pico_adapter(base, target_modules=["c_attn"])


REFUSED = {
    "a kind that PEFT merges": (boft, "merging an adapter of type BOFT needs PEFT, which is not installed"),
    "a family with weights the other way round": (
        gpt2,
        "looking up the modules of a gpt2 model needs transformers, which is not installed",
    ),
}
"""What has to be refused: base and adapter, and the sentence."""


@pytest.fixture(scope="module")
def makers(pico, pico_adapter, tmp_path_factory):
    return Makers(pico, pico_adapter, tmp_path_factory.mktemp("lean"))


@pytest.fixture(scope="module")
def merged(makers):
    """Every case, merged by two processes: one that has the heavy packages and one that does not.

    The one without them also verifies some outputs, and gets what it must refuse.
    """
    commands = {"with": [], "without": []}
    for n, (name, make) in enumerate(CASES.items()):
        base, adapters = make(makers)
        named = [part for adapter in adapters for part in ("--adapter", adapter)]
        for side, made in commands.items():
            # Outputs of one name: the model card has it as its title.
            out = makers.place / side / str(n)
            made.append(["merge", "--base", base, *named, "--out", out, *ONE_WORKER, *OPTIONS.get(name, ())])
    for name in VERIFIED:
        base, (adapter,) = CASES[name](makers)
        out = makers.place / "without" / str(list(CASES).index(name))
        commands["without"].append(["verify", out, "--base", base, "--adapter", adapter])
    for make, _ in REFUSED.values():
        base, adapter = make(makers)
        commands["without"].append(
            ["merge", "--base", base, "--adapter", adapter, "--out", makers.place / "refused"]
        )
    return makers.place, run(commands["with"]), run_lean(commands["without"])


def contents(root):
    """Return the files of an output; the manifest without the versions of packages, which may differ."""
    found = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    manifest = json.loads(found["merge_manifest.json"])
    del manifest["versions"]
    return found | {"merge_manifest.json": json.dumps(manifest)}


def said_by(done):
    return " ".join(done["output"].split())


@pytest.mark.parametrize("name", CASES)
def test_a_merge_without_the_heavy_packages_writes_the_same_bytes(name, merged):
    place, rich, lean = merged
    n = list(CASES).index(name)
    assert lean["runs"][n]["code"] == 0, lean["runs"][n]["output"]
    assert rich["runs"][n]["code"] == 0, rich["runs"][n]["output"]
    wanted, got = contents(place / "with" / str(n)), contents(place / "without" / str(n))
    assert wanted.keys() == got.keys()
    assert [file for file in wanted if wanted[file] != got[file]] == []
    assert "merge_manifest.json" in got


def test_the_tokenizer_is_copied(merged):
    place, _, _ = merged
    assert (place / "without" / "0" / "tokenizer.json").is_file()


def test_a_plain_merge_does_not_even_try_to_import_them(merged):
    """Neither the process that lacks them nor the one that has them."""
    _, rich, lean = merged
    assert [done["asked"] for done in lean["runs"][: len(CASES)]] == [[]] * len(CASES)
    assert rich["loaded"] == []


@pytest.mark.parametrize("name", VERIFIED)
def test_an_output_is_verified_without_them_and_a_note_says_what_was_not_checked(name, merged):
    verified = merged[2]["runs"][len(CASES) + VERIFIED.index(name)]
    assert verified["code"] == 0, verified["output"]
    what = "checking that every parameter has a tensor needs transformers, which is not installed"
    # Of the most common decoders the parameters are known without it.
    assert (what in said_by(verified)) == (name == "Gemma 2")


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_them_says_so_in_one_sentence_and_writes_nothing(name, merged):
    place, _, lean = merged
    refused = lean["runs"][len(CASES) + len(VERIFIED) + list(REFUSED).index(name)]
    said = said_by(refused)
    assert refused["code"] == 2, said
    assert REFUSED[name][1] in said
    assert 'pip install "lora-merge[full]"' in said
    assert not (place / "refused").exists()


def imitation(place, version, source):
    """Return a directory with an importable package named transformers, and the metadata of an installed one."""
    package, metadata = place / "transformers", place / f"transformers-{version}.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text(source)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
    return place


BROKEN = {
    "too old": ("5.22.1", "", "needs transformers 5.23 or newer, and version 5.22.1 is installed"),
    "too old and broken": (
        "4.57.0",
        "raise ImportError('huggingface-hub<1.0 is required')",
        "needs transformers 5.23 or newer, and version 4.57.0 is installed",
    ),
    "a part of it is missing": (
        "5.23.0",
        "import a_package_that_is_not_there",
        "needs transformers, which is installed, but its import fails (ModuleNotFoundError: No module named",
    ),
    "it raises": (
        "5.23.0",
        "raise RuntimeError('operator torchvision::nms does not exist\\nand more')",
        "but its import fails (RuntimeError: operator torchvision::nms does not exist)",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_installation_that_does_not_work_is_told_from_one_that_is_missing(name, makers, tmp_path):
    version, source, sentence = BROKEN[name]
    paths = [imitation(tmp_path, version, source)]
    base = makers.pico("gpt2")
    adapter = makers.pico_adapter(base, target_modules=["c_attn"])
    command = ["plan", "--base", base, "--adapter", adapter]
    (refused,) = run([command], paths=paths)["runs"]
    assert refused["code"] == 2, refused["output"]
    assert sentence in " ".join(refused["output"].split())


def test_the_extras_have_the_bounds_that_are_checked_and_the_default_lacks_the_heavy_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package in PACKAGES.values():
        wanted = [re.sub(r"\[.*\]", "", line) for line in project["optional-dependencies"][package.extra]]
        assert f"{package.name}>={package.oldest}" in wanted
    assert not [line for line in project["dependencies"] if line.startswith(HEAVY)]
