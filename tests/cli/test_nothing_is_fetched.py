"""No verb asks a hub or loads code for local directories, whatever their configurations name.

Each command runs online, in a process with a token and a package ``kernels`` that writes down what is asked of it. Any socket
fails the test (`tests/no_sockets`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tampering import edit_json

ROOT = Path(__file__).parents[2]

ELSEWHERE = {
    "_name_or_path": "evil/model",
    "_attn_implementation": "evil/kernel",
    "attn_implementation": "evil/kernel",
    "_experts_implementation": "evil/kernel",
    "auto_map": {"AutoModel": "evil/code--model.Model", "AutoModelForCausalLM": "evil/code--model.Model"},
    "trust_remote_code": True,
    "use_pretrained_backbone": True,
}
BASES = {
    "kernels": ELSEWHERE,
    "a backbone by its name": {
        **ELSEWHERE, "model_type": "detr", "architectures": ["DetrForObjectDetection"], "use_timm_backbone": False,
        "backbone": "evil/backbone", "backbone_config": None,
    },
    "a backbone that may be a repo": {
        **ELSEWHERE, "model_type": "upernet", "architectures": ["UperNetForSemanticSegmentation"], "backbone": "resnet50",
        "backbone_config": None,
    },
    "a module that loads kernels when it is imported": {**ELSEWHERE, "model_type": "bark", "architectures": ["BarkModel"]},
    "a function for a class": {**ELSEWHERE, "architectures": ["pipeline"]},
}  # fmt: skip

EXPECTED = {"kernels": [0, 0, 0, 4], "a module that loads kernels when it is imported": [0, 6, 0, 4]}
"""Exit codes of merge, verify, inspect, and plan with all linear layers, of which the adapter lacks some. Of other
bases nobody knows the layers; Bark has parameters that no tensor fills."""

KERNELS = """
class Any:
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return a[0] if a else None
    def __enter__(self): pass
    def __exit__(self, *a): pass

def get_kernel(*a, **k):
    open({log!r}, "a").write(repr(a) + "\\n")
    raise RuntimeError("no kernel")

def use_kernel_forward_from_hub(name): return lambda kind: kind
def use_kernelized_func(*a): return lambda kind: kind

def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Any
"""

RUN = """
import json, sys
from click.testing import CliRunner
from lora_merge.cli import main
for command in json.load(sys.stdin):
    done = CliRunner().invoke(main, command)
    print(json.dumps([command[0], done.exit_code, done.output]), flush=True)
"""


@pytest.fixture
def site(tmp_path):
    """Return a directory with a package ``kernels``, and the log of what is asked of it."""
    root, log = tmp_path / "site", tmp_path / "kernels.log"
    (root / "kernels").mkdir(parents=True)
    (root / "kernels" / "__init__.py").write_text(KERNELS.format(log=str(log)))
    about = root / "kernels-0.18.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (about / "RECORD").write_text("kernels/__init__.py,,\n")
    return root, log


def run(commands, site):
    """Run commands one after the other in one process; return their verbs, exit codes and words."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), os.environ["PYTHONPATH"], str(ROOT)]),
        "HF_TOKEN": "hf_SECRETsecretSECRETsecret",
        "HF_ENDPOINT": "http://hub.invalid",
    }
    texts = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN], input=texts, env=environment, capture_output=True, text=True, check=True
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr
    return found


@pytest.fixture
def inputs(pico, pico_adapter, tmp_path):
    """Return a function (name) → base and adapter, and the adapter as one of all linear layers, all of strangers."""

    def make(name):
        folder = tmp_path / name
        base, adapter, all_linear = (folder / part for part in ("base", "adapter", "all-linear"))
        shutil.copytree(pico(), base)
        edit_json(base / "config.json", **BASES[name])
        edit_json(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/code--tok.Tok", None]})
        elsewhere = {
            "base_model_name_or_path": "evil/base",
            "megatron_config": {"a": 1},
            "megatron_core": "evil_module",
        }
        for root in (adapter, all_linear):
            shutil.copytree(pico_adapter(pico()), root)
            edit_json(root / "adapter_config.json", **elsewhere)
        edit_json(all_linear / "adapter_config.json", target_modules="all-linear")
        return base, adapter, all_linear

    return make


def test_no_verb_fetches_what_a_configuration_names(inputs, site, tmp_path):
    commands, expected = [], []
    for name in BASES:
        base, adapter, all_linear = inputs(name)
        out, both = tmp_path / name / "out", ("--base", base, "--adapter", adapter)
        commands += [
            ("merge", *both, "--out", out), ("verify", out, *both), ("inspect", adapter, "--base", base),
            ("plan", "--base", base, "--adapter", all_linear),
        ]  # fmt: skip
        expected += EXPECTED.get(name, [0, 0, 0, 0])
    base, adapter, out = (tmp_path / "kernels" / part for part in ("base", "adapter", "out"))
    both = ("--base", base, "--adapter", adapter)
    (tmp_path / "batch.yaml").write_text(
        f"jobs:\n- {{base: {base}, adapter: {adapter}, out: {tmp_path}/of-a-batch}}\n"
    )
    commands += [
        ("verify", out, *both, "--forward"),
        ("verify", out, *both, "--forward", "--trust-remote-code", "--prompt", "hello"),
        ("convert", adapter, "--base", base, "--out", tmp_path / "converted", "--rank", "2", "--rename", "v5"),
        ("extract", "--base", base, "--tuned", out, "--rank", "2", "--out", tmp_path / "extracted"),
        ("batch", tmp_path / "batch.yaml"),
    ]  # fmt: skip
    expected += [0, 2, 0, 0, 0]  # 2: the tokenizer that its own code would make is in another repo

    found = run(commands, site[0])

    assert not site[1].exists(), site[1].read_text()
    assert [code for _, code, _ in found] == expected, "\n".join(
        f"{verb}: {code}: {words}" for verb, code, words in found
    )
    noted = [
        n
        for n, (*_, words) in enumerate(found)
        if "evil/backbone, which would have to be downloaded" in words
    ]
    assert noted[:2] == [4, 5]  # merge and verify of the base whose backbone is a repo
