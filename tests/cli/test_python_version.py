"""An older Python gets a sentence, not a SyntaxError."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_merge

ROOT = Path(lora_merge.__file__).parents[1]
READ_FIRST = ("__init__.py", "__main__.py", "_version.py", "cli/__init__.py")
"""Modules that Python reads before the version is checked."""

OLD = [name for name in ("python3.7", "python3.8", "python3.9", "python3.10") if shutil.which(name)]


@pytest.mark.parametrize("module", READ_FIRST)
def test_what_is_read_before_the_check_is_python_that_an_older_one_parses(module):
    ast.parse((ROOT / "lora_merge" / module).read_text(), feature_version=(3, 7))


@pytest.mark.parametrize("version", [(3, 7, 17), (3, 9, 18), (3, 10, 13)])
def test_a_version_that_is_too_old_is_named(version):
    code = f"import sys; sys.version_info = {version}; import lora_merge.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    first, second = done.stderr.splitlines()
    wanted = f"error: lora-merge needs Python 3.11 or newer, and this is Python {version[0]}.{version[1]} ("
    assert first.startswith(wanted)
    assert second.startswith("hint: ")


@pytest.mark.skipif(not OLD, reason="no Python older than 3.11 is on the path")
def test_a_real_older_python_says_it():
    found = []
    for name in OLD:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        command = [name, "-m", "lora_merge", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        # A shim of a version manager may be on the path without the Python behind it.
        if "lora-merge" in done.stderr:
            found.append(done.stderr.splitlines())
    if not found:
        pytest.skip("none of the older ones starts")
    for lines in found:
        assert lines[0].startswith("error: lora-merge needs Python 3.11 or newer, and this is Python 3.")
        assert len(lines) == 2
