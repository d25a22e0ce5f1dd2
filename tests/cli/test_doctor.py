"""``lora-merge doctor``: a page for a bug report, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from lora_merge.cli import exits
from lora_merge.diagnosis.caches import cached_repos, hub_cache
from lora_merge.diagnosis.facts import Diagnosis, Gpu, Package, Torch
from lora_merge.diagnosis.findings import findings
from lora_merge.diagnosis.packages import packages
from lora_merge.diagnosis.places import disks, programs
from lora_merge.diagnosis.run import diagnose
from lora_merge.diagnosis.stores import stores
from lora_merge.diagnosis.variables import variables

SECRET = "hf_" + "aB3" * 12
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def machine():
    """This machine, without anything that could be missing or short here."""
    found = diagnose().machine
    ample = tuple(
        replace(disk, free_bytes=10**12, is_writable=True, has_reflinks=False) for disk in found.disks
    )
    torch = Torch("2.13.0", "CPU", ())
    whole = tuple(replace(one, version=one.version or "999", oldest="") for one in found.packages)
    return replace(found, torch=torch, disks=ample, packages=whole, memory_free_bytes=10**11, variables=())


def sentences(machine, severity):
    return [f"{one.sentence}; {one.hint}" for one in findings(machine) if one.severity == severity]


def test_the_page_has_everything_that_a_bug_report_needs(cli):
    import torch

    from lora_merge import __version__

    result = cli("doctor")

    assert result.exit_code == exits.OK
    assert result.stderr == ""
    text = result.stdout
    assert text.startswith(f"lora-merge {__version__}\n")
    for part in (
        "Machine:",
        "Python ",
        f"torch {torch.__version__}, built for",
        "Packages:",
        "Disks:",
        "current directory",
    ):
        assert part in " ".join(text.split())
    assert text.rstrip().splitlines()[-1] == "ok: a plain LoRA can be merged on this machine"


def test_the_same_as_data(cli):
    document = json.loads(cli("doctor", "--json").stdout)

    assert document["ok"]
    assert {"version", "python", "torch", "packages", "disks", "caches", "engines", "variables"} <= set(
        document["machine"]
    )
    assert document["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["findings"][-1]["severity"] == "ok"


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_no_secret_is_shown(form, cli, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "another-secret-value")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:hunter2@proxy.example:8080")

    text = cli("doctor", *form).stdout

    assert SECRET not in text
    assert "another-secret-value" not in text
    assert "hunter2" not in text
    assert "proxy.example:8080" in text
    assert text.count("(set)") == 2


def test_python_gets_the_same_as_a_value():
    import lora_merge

    found = lora_merge.diagnose()

    assert isinstance(found, lora_merge.Diagnosis)
    assert found.can_merge
    assert found.machine.version == lora_merge.__version__


def test_a_machine_that_has_everything_gets_no_warning(machine):
    assert {one.severity for one in findings(machine)} == {"ok"}
    assert Diagnosis(machine, findings(machine)).can_merge


def test_a_torch_that_cannot_be_imported_makes_merging_impossible(machine):
    broken = replace(
        machine, torch=Torch("", "", (), "ImportError: libcudart.so.12: cannot open shared object file")
    )

    (error,) = sentences(broken, "error")
    assert error.startswith("torch cannot be imported (ImportError: libcudart.so.12")
    assert "pip install --force-reinstall torch" in error
    assert not Diagnosis(broken, findings(broken)).can_merge


def test_the_command_fails_where_merging_is_impossible(tmp_path):
    """A torch that raises when it is imported, in front of the real one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('libcudart.so.12: cannot open shared object file')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}

    result = subprocess.run(
        [sys.executable, "-m", "lora_merge", "doctor"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        cwd=ROOT,
    )

    assert result.returncode == exits.PLAN, result.stderr
    assert "error: torch cannot be imported (ImportError: libcudart.so.12" in result.stdout
    assert "a plain LoRA can be merged" not in result.stdout


def test_it_runs_without_any_package_but_click():
    """Each module is None in a process of its own, so that importing it fails."""
    hidden = (
        "torch",
        "numpy",
        "pydantic",
        "yaml",
        "rich",
        "safetensors",
        "tokenizers",
        "xxhash",
        "huggingface_hub",
        "jinja2",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "from lora_merge.cli import main\n"
        "main(['doctor'], prog_name='lora-merge')"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )

    assert result.returncode == exits.PLAN, result.stderr
    assert result.stderr == ""
    assert "error: torch cannot be imported (ModuleNotFoundError" in result.stdout


def test_a_gpu_that_torch_does_not_find_is_a_warning(machine):
    without = replace(machine, torch=Torch("2.13.0", "CUDA 12.8", ()))
    with_one = replace(machine, torch=Torch("2.13.0", "CUDA 12.8", (Gpu("NVIDIA H200", 140 * 10**9, "9.0"),)))

    (warning,) = sentences(without, "warning")
    assert warning.startswith("torch is built for CUDA 12.8, but finds no GPU")
    assert not sentences(with_one, "warning")
    assert any("--device cuda" in one for one in sentences(with_one, "ok"))


@pytest.mark.parametrize(
    ("package", "severity", "words"),
    [
        (Package("safetensors", "", "0.5", "", "every merge"), "error", 'safetensors is not installed; every merge needs it; pip install "safetensors>=0.5"'),
        (Package("click", "7.0", "8.1", "", "every merge"), "error", "click 7.0 is too old, expected 8.1 or newer"),
        (Package("peft", "", "0.21", "full", "DoRA"), "warning", 'peft is not installed; needed for DoRA; pip install "lora-merge[full]"'),
        (Package("peft", "0.9.0", "0.21", "full", "DoRA"), "warning", "peft 0.9.0 is too old, expected 0.21 or newer"),
    ],
)  # fmt: skip
def test_a_missing_or_old_package_is_named_with_the_command_that_installs_it(
    package, severity, words, machine
):
    found = sentences(replace(machine, packages=(*machine.packages, package)), severity)

    assert len(found) == 1
    assert found[0].startswith(words)


def test_packages_are_those_of_the_metadata():
    found = {
        one.name: one
        for one in packages(
            [
                "click>=8.1",
                "nothing-of-this-name>=2",
                "gguf>=0.19; extra == 'gguf'",
                "pytest>=8; extra == 'dev'",
            ]
        )
    }

    assert found["click"].version
    assert found["click"].oldest == "8.1"
    assert not found["click"].is_too_old
    assert found["nothing-of-this-name"].is_missing
    assert (found["gguf"].extra, found["gguf"].oldest) == ("gguf", "0.19")
    assert "pytest" not in found


def test_a_full_disk_and_one_that_is_not_writable_are_warnings(machine):
    here, temporary, cache = machine.disks
    short = replace(
        machine, disks=(replace(here, free_bytes=10**9), temporary, replace(cache, is_writable=False))
    )

    first, second = sentences(short, "warning")
    assert first.startswith("the current directory has 1.00 GB free")
    assert "-o /path" in first
    assert "not writable" in second
    assert "HF_HUB_CACHE" in second


def test_little_memory_and_offline_mode_are_warnings(machine, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short = replace(machine, memory_free_bytes=10**9, variables=variables())

    memory, offline = sentences(short, "warning")
    assert "1.00 GB of memory are free" in memory
    assert "--memory-limit" in memory
    assert "HF_HUB_OFFLINE" in offline


def test_nothing_is_left_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    here, *_ = disks()

    assert here.path == str(tmp_path)
    assert here.is_writable
    assert here.has_reflinks in {True, False}
    assert not list(tmp_path.iterdir())


def test_a_current_directory_that_was_removed_is_left_out(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    assert "current directory" not in {disk.name for disk in disks()}


def test_engines_on_the_path_are_found(tmp_path, monkeypatch, cli):
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert [(one.name, one.place) for one in programs()] == [("llama-server", str(program))]
    assert str(program) in cli("doctor").stdout


def test_the_home_directory_is_not_spelt_out(tmp_path, monkeypatch, cli):
    (tmp_path / "cache" / "models--org--name").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    text = cli("doctor").stdout

    assert "Hugging Face Hub  1 repo in ~/cache" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "HOME/.cache/huggingface/hub"),
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(environment, found):
    """Asked of the library itself, in a process of its own."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "XDG_", "HUGGINGFACE"))
    }
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**clean, **environment}
    ).stdout.strip()

    assert str(hub_cache(environment)) == theirs == found.replace("HOME", str(Path.home()))


def test_cached_adapters_and_models_are_told_apart(tmp_path):
    for name, file in (("models--org--model", "config.json"), ("models--org--lora", "adapter_config.json")):
        (tmp_path / name / "snapshots" / "0").mkdir(parents=True)
        (tmp_path / name / "snapshots" / "0" / file).write_text("{}")
    environment = {"HF_HUB_CACHE": str(tmp_path)}

    assert cached_repos(adapters=False, environ=environment) == ["org/model"]
    assert cached_repos(adapters=True, environ=environment) == ["org/lora"]
    assert cached_repos(adapters=True, environ={"HF_HUB_CACHE": str(tmp_path / "none")}) == []


def test_a_source_tree_that_is_not_installed_knows_what_it_needs(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {one.name: one for one in packages()}

    assert {text.partition(">=")[0] for text in project["dependencies"]} <= found.keys()
    assert (found["gguf"].extra, found["gguf"].oldest) == ("gguf", "0.19")
    assert "ruff" not in found


CREDENTIALS = {
    "environment variables": (
        {"AWS_ACCESS_KEY_ID": "AKIA0", "AWS_SECRET_ACCESS_KEY": "secret-of-the-test"},
        "found: environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)",
    ),
    "half of them": ({"AWS_ACCESS_KEY_ID": "AKIA0"}, ""),
    "a web identity": (
        {"AWS_WEB_IDENTITY_TOKEN_FILE": "/t", "AWS_ROLE_ARN": "arn"},
        "found: a web identity (AWS_WEB_IDENTITY_TOKEN_FILE, AWS_ROLE_ARN)",
    ),
    "nothing": ({}, ""),
}


@pytest.mark.parametrize("case", CREDENTIALS)
def test_it_is_said_where_credentials_of_stores_were_found_and_never_what_they_are(case, tmp_path):
    given, says = CREDENTIALS[case]
    found = {one.name: one.credentials for one in stores(given | {"HOME": str(tmp_path)})}
    assert found == {"s3://": says, "gs://": "", "az://": ""}
    assert "secret-of-the-test" not in str(variables(given))


def test_files_with_credentials_are_found_by_their_place(tmp_path):
    gcloud, aws = tmp_path / ".config" / "gcloud", tmp_path / ".aws"
    for folder, name in ((gcloud, "application_default_credentials.json"), (aws, "credentials")):
        folder.mkdir(parents=True)
        (folder / name).write_text("{}")
    found = {one.name: one.credentials for one in stores({"HOME": str(tmp_path)})}
    assert found["s3://"] == "found: a profile (~/.aws/credentials)"
    assert found["gs://"].startswith("found: application default credentials (~/.config/gcloud")
    moved = {"HOME": "/none", "AWS_SHARED_CREDENTIALS_FILE": str(aws / "credentials")}
    assert {one.name: one.credentials for one in stores(moved)}["s3://"] == (
        "found: a profile (AWS_SHARED_CREDENTIALS_FILE)"
    )
