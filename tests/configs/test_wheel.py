"""The wheel: what is in it, and whether the command works where nothing else of the project is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import lora_merge

NO_SOCKETS = str(Path(__file__).parents[1] / "no_sockets")

ROOT = Path(__file__).parents[2]
OPTIONAL = ("accelerate", "boto3", "gguf", "matplotlib", "modelscope", "obstore", "peft", "transformers")

pytestmark = pytest.mark.system


def own_setuptools():
    """Return pip's option to build with the setuptools that is here, where it is new enough: that asks no registry."""
    try:
        is_new = int(version("setuptools").partition(".")[0]) >= 77
    except PackageNotFoundError:
        is_new = False
    return ["--no-build-isolation"] if is_new else []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a wheel of the project, built from a copy of what belongs to it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("lora_merge", "man", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *own_setuptools()]
    command = [*pip, "--wheel-dir", out, source]
    subprocess.run(command, check=True, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def empty(wheel, tmp_path_factory):
    """Return a new environment with the wheel in it, and what it needs from the one that the tests run in.

    Nothing optional can be imported there.
    """
    root = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", root], check=True)
    python = root / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True, capture_output=True
    )
    (site,) = root.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in OPTIONAL)
    (site / "hidden.pth").write_text(f"import sys; {hidden}\n")
    return root


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
        (entries,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))

    assert "lora_merge/py.typed" in names
    templates = {f"lora_merge/reporting/templates/page.{suffix}" for suffix in ("html.j2", "css", "js")}
    assert templates <= set(names)
    own = wheel.name.rsplit("-", 3)[0]
    assert {name.split("/")[0] for name in names} == {"lora_merge", f"{own}.dist-info", f"{own}.data"}
    manuals = {path.name for path in (ROOT / "man").iterdir()}
    assert {name for name in names if name.startswith(f"{own}.data/")} == {
        f"{own}.data/data/share/man/man1/{name}" for name in manuals
    }
    assert any(name.endswith("LICENSE") for name in names)
    assert f"Version: {lora_merge.__version__}\n" in metadata
    assert "lora-merge = lora_merge.cli:entry" in entries
    assert "hf-lora-merge = lora_merge.cli:hf_entry" in entries
    for extra in ("full", "gguf", "modelscope", "objects", "plot", "s3"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_command_merges_in_an_environment_of_its_own(empty, pico, pico_adapter, tmp_path):
    def run(*command):
        environment = {**os.environ, "PYTHONPATH": NO_SOCKETS}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    command, python = empty / "bin" / "lora-merge", empty / "bin" / "python"
    where = run(python, "-c", "import lora_merge; print(lora_merge.__file__)")
    helped, version = run(command, "--help"), run(python, "-m", "lora_merge", "--version")
    merged = run(command, "--base", pico(), "--adapter", pico_adapter(pico()), "--out", "merged")
    inspected = run(command, "inspect", pico_adapter(pico()), "--plot", "plot.png")

    assert Path(where.stdout.strip()).is_relative_to(empty)
    assert helped.returncode == 0
    assert "Usage: lora-merge" in helped.stdout
    assert version.stdout == f"lora-merge, version {lora_merge.__version__}\n"
    assert merged.returncode == 0, merged.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert inspected.returncode == 2
    assert 'pip install "lora-merge[plot]"' in inspected.stderr
