"""Commands that are run as somebody else, by root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def open_to_all(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let other users come to a test's directory."""
    parents = (path for path in tmp_path.parents if path.is_relative_to(tmp_path_factory.getbasetemp()))
    for path in (*tmp_path.rglob("*"), tmp_path, *parents):
        path.chmod(path.stat().st_mode | 0o055)
    for path in tmp_path_factory.getbasetemp().parents:
        if path.name.startswith("pytest-"):
            path.chmod(path.stat().st_mode | 0o011)


def in_python(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a Python of its own; its first argument is this one's ``sys.path``."""
    return subprocess.run(
        [sys.executable, "-c", program, os.pathsep.join(sys.path), *map(str, arguments)],
        check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
