"""Measure what rounding keeps of an adapter, for docs/rounding.md.

    scripts/rounding.py                  measure everything, and print the tables
    scripts/rounding.py --only trained   one part: grids, trained, scaled or on_write
    scripts/rounding.py --write          the same, and write docs/rounding.json, the page's tables and the pictures
    scripts/rounding.py --draw           write tables and pictures of what docs/rounding.json holds already

All merges are those of ``lora_merge.merge``: bases are quantised with ``--quantize`` (NF4: by bitsandbytes, in the
environment of ``make oracles``), and merged with ``--rounding`` and ``--out-storage base``. Nothing is downloaded. Checkpoints
stay in ``.rounding/``. Trained models are kept there for the next run; all else is made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import demo
import torch
from rounded import explained, grids, models, plotted, tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGE, RESULTS = DOCS / "rounding.md", DOCS / "rounding.json"
WORK = ROOT / ".rounding"
ORACLES = ROOT / ".venv-oracles" / "bin" / "python"
PACKAGES = ("lora-merge", "torch", "transformers", "peft")
PARTS = ("grids", "trained", "scaled", "on_write")
DIGITS = 5
"""Significant ones, of what is written."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what rounding keeps of an adapter.")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; may be repeated")
    parser.add_argument("--write", action="store_true", help="write docs/rounding.json, tables and pictures")
    parser.add_argument("--draw", action="store_true", help="measure nothing: tables and pictures alone")
    parser.add_argument("--oracles-python", type=Path, default=ORACLES, help="Python that has bitsandbytes")
    parser.add_argument("--threads", type=int, help="of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    measured = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not arguments.draw:
        demo.quiet_libraries()
        measured |= measure(arguments.only or PARTS, arguments.oracles_python)
    for name, (source, make) in tables.TABLES.items():
        if source in measured:
            print(f"\n{name}\n\n{tables.text(make(measured[source]))}")
    if arguments.write or arguments.draw:
        write(measured)


def measure(parts: Iterable[str], oracles: Path) -> dict[str, Any]:
    """Return what was measured, by part, with the releases that it was measured with."""
    if "trained" in parts and not oracles.exists():
        sys.exit(f"rounding: {oracles} is not there; `make oracles` installs bitsandbytes for NF4")
    for part in ("grids", "on_write"):
        shutil.rmtree(WORK / part, ignore_errors=True)
    by_part: dict[str, Callable[[Path], Iterable[dict[str, Any]]]] = {
        "grids": grids.rows,
        "on_write": grids.rows_on_write,
        "trained": lambda work: models.rows(work, oracles),
        "scaled": models.scaled_rows,
    }
    found: dict[str, Any] = {"with": {package: version(package) for package in PACKAGES}}
    for part in parts:
        work = WORK / ("models" if part in {"trained", "scaled"} else part)
        work.mkdir(parents=True, exist_ok=True)
        found[part] = []
        for row in by_part[part](work):
            print(f"{part}: {json.dumps(shortened(row))}", file=sys.stderr, flush=True)
            found[part].append(shortened(row))
    return found


def shortened(value: Any) -> Any:
    """Return numbers with the digits that mean something."""
    if isinstance(value, dict):
        return {name: shortened(each) for name, each in value.items()}
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def write(measured: dict[str, Any]) -> None:
    """Write results, tables and pictures."""
    lines = [f'"with": {json.dumps(measured["with"])}']
    for part in PARTS:
        rows = ",\n".join(f" {json.dumps(row)}" for row in measured[part])
        lines.append(f'"{part}": [\n{rows}\n]')
    RESULTS.write_text("{" + ",\n".join(lines) + "}\n")
    tables.write_page(PAGE, measured)
    for name, picture in pictures(measured).items():
        (DOCS / name).write_text(picture)


def pictures(measured: dict[str, Any]) -> dict[str, str]:
    """Return file name → SVG of each picture of the page."""
    return {
        "rounding.svg": explained.picture(),
        "rounding-gain.svg": plotted.gains(measured["trained"]),
        "rounding-error.svg": plotted.errors(measured["grids"]),
    }


if __name__ == "__main__":
    main()
