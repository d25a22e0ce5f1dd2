"""Runs a module of `tests.storages.making` in the oracles' environment."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

from tests.storages.reference import FIXTURES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

ROOT = FIXTURES.parents[2]


def ask(python: Path, module: str, arguments: Iterable[object]) -> dict[str, Any]:
    """Return the last line that it prints, parsed. Libraries print before it."""
    environment = {key: value for key, value in os.environ.items() if key != "SOCKET_LOG"}
    environment |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
