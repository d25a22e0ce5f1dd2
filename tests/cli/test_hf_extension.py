"""``hf lora-merge``: the real ``hf`` runs the console script that its convention asks for."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lora_merge import __version__
from lora_merge.cli import exits

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
SCRIPT = "hf-lora-merge"


@pytest.fixture(scope="module")
def entry():
    """The function behind the console script, as ``module:name``."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"][SCRIPT]


@pytest.fixture(scope="module")
def hf(tmp_path_factory, entry):
    """Return a function that runs ``hf`` in a home where the extension is installed as ``hf extensions install`` does it.

    The script is the one that pip would write; the manifest is written by huggingface_hub's own class.
    """
    extensions = pytest.importorskip(
        "huggingface_hub.cli.extensions", reason="this huggingface_hub has no extensions"
    )
    program = shutil.which("hf", path=str(Path(sys.executable).parent)) or shutil.which("hf")
    if program is None:
        pytest.skip("hf is not installed")
    home = tmp_path_factory.mktemp("home")
    place = home / ".local" / "share" / "hf" / "extensions" / SCRIPT
    script = place / "venv" / "bin" / extensions._get_executable_name("lora-merge")
    script.parent.mkdir(parents=True)
    module, _, name = entry.partition(":")
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n")
    script.chmod(0o755)
    from datetime import UTC, datetime

    extensions.ExtensionManifest(
        owner="owner",
        repo=SCRIPT,
        repo_id=f"owner/{SCRIPT}",
        short_name="lora-merge",
        executable_path=str(script),
        type="python",
        installed_at=datetime.now(UTC),
        description="Merge LoRA adapters",
        commit_sha=None,
    ).save(place)

    def run(*arguments):
        # hf itself would look for updates of its own parts.
        environment = {
            **os.environ,
            "HOME": str(home),
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "80",
            "NO_COLOR": "1",
        }
        return subprocess.run(
            [program, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            cwd=home,
        )

    return run


def test_the_script_has_the_name_that_hf_derives_from_the_repository(entry):
    """`hf` refuses an installed package without a console script of the repository's name."""
    extensions = pytest.importorskip("huggingface_hub.cli.extensions")
    module, _, name = entry.partition(":")

    assert extensions._normalize_repo_id(f"owner/{SCRIPT}") == ("owner", SCRIPT, "lora-merge")
    assert extensions._get_executable_name("lora-merge").removesuffix(".exe") == SCRIPT
    assert callable(getattr(importlib.import_module(module), name))


def test_hf_runs_a_merge(hf, pico, pico_adapter, tmp_path):
    made = hf(
        "lora-merge", "--base", pico(), "--adapter", pico_adapter(pico()), "-o", tmp_path / "merged", "--json"
    )

    assert made.returncode == exits.OK, made.stderr
    assert json.loads(made.stdout)["ok"]
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_next_command_after_a_dry_run_exists_there(hf, pico, pico_adapter, tmp_path):
    merge = ("--base", pico(), "--adapter", pico_adapter(pico()), "-o", tmp_path / "merged", "--dry-run")

    done = hf("lora-merge", *merge)

    assert done.returncode == exits.OK, done.stderr
    assert "\n  hf lora-merge --base " in done.stderr
    assert "\n  lora-merge " not in done.stderr


def test_hf_lists_the_extension(hf):
    assert "lora-merge" in hf("extensions", "list").stdout


def test_version_and_exit_codes_pass_through(hf):
    assert hf("lora-merge", "--version").stdout == f"lora-merge, version {__version__}\n"
    assert hf("lora-merge", "verify", "missing").returncode == exits.RESOLVE


def test_help_and_hints_are_commands_that_exist_there(hf):
    helped, wrong = hf("lora-merge", "--help"), hf("lora-merge", "--model", "b", "--adapter", "a", "-o", "o")

    assert helped.stdout.startswith("Usage: hf lora-merge ")
    assert "    hf lora-merge --base " in helped.stdout
    assert "    lora-merge " not in helped.stdout
    assert wrong.returncode == exits.USAGE
    assert "hint: hf lora-merge --base b --adapter a -o o" in wrong.stderr
