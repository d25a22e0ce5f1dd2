"""Make the quantised checkpoints in ``tests/fixtures/quantised`` again, and what their libraries decode from them.

Run it with the interpreter of the oracles' environment, which ``make oracles`` creates:

    .venv-oracles/bin/python scripts/storage_fixtures.py [NAME…]

Beside each checkpoint it writes a JSON file: which release of which library wrote it, which one decoded it, and digests
of the decoded weights.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "quantised"


def main(names: list[str]) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    sys.path.insert(0, str(ROOT))
    encoders = importlib.import_module("tests.storages.making.encoders")
    unknown = set(names) - set(encoders.ENCODERS)
    if unknown:
        sys.exit(f"unknown fixture: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or encoders.ENCODERS:
            make(name, Path(folder), encoders)


def make(name: str, work: Path, encoders: Any) -> None:
    """Make one fixture, and its JSON file."""
    models = importlib.import_module("tests.storages.making.models")
    oracles = importlib.import_module("tests.storages.making.oracles")
    encoder = encoders.ENCODERS[name]
    base = work / encoder.model.replace(" ", "-")
    if not base.exists():
        models.build(encoder.model, base)
    out = work / name
    encoder.encode(base, out)
    encoders.clear(out)
    made_by = ", ".join(f"{package} {oracles.version(package)}" for package in encoder.packages)
    said = {"made_by": made_by, **oracles.ask(out)}
    shutil.rmtree(FIXTURES / name, ignore_errors=True)
    shutil.copytree(out, FIXTURES / name)
    (FIXTURES / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n")
    n_bytes = sum(path.stat().st_size for path in out.iterdir())
    print(f"{name}: {n_bytes} bytes, made by {made_by}, decoded by {said['oracle']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
