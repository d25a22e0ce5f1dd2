"""Checkpoints as large as the largest that are published, on a small disk: hollow ones are planned, slices are merged.

    scripts/hollow.py make DeepSeek-V3 DIR     base, and adapters of the attention and of all layers
    scripts/hollow.py plans --write            dry runs of every model, measured, into docs/scale.json
    scripts/hollow.py slices --write           merges of a few layers in their real sizes, on a disk and in a store

A hollow file has its real header, and a hole for its data: it reads as zeros and takes no room. Such a model is planned as
a full one is. A slice has random values, is merged for real, and verified completely. ``scripts/docs.py --write`` makes
the tables of docs/scale.md from docs/scale.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import machine, machine_line
from benchmarks.measure import RunError
from hollows import planned, slices
from hollows.models import MODELS, TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hollows.models import Model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "scale.json"
WORK = ROOT / ".bench" / "hollow"


def main() -> None:
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except RunError as exc:
        sys.exit(f"hollow: {exc}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make", help="make a hollow model with its adapters")
    make.add_argument("model", choices=MODELS)
    make.add_argument("directory", type=Path, help="that is made; an existing one is refused")
    make.set_defaults(run=_make)
    plans = commands.add_parser("plans", help="measure dry runs")
    _measuring(plans)
    plans.set_defaults(run=_plans)
    some = commands.add_parser("slices", help="merge and verify slices, measured")
    _measuring(some)
    some.add_argument(
        "--on", default=",".join(slices.PLACES), help="where, the first is compared with [%(default)s]"
    )
    some.add_argument("--level", choices=("full", "sample"), default="full", help="of verify [%(default)s]")
    some.add_argument("--case", action="append", help="adapter and storage, as all:base; may be repeated")
    some.set_defaults(run=_slices)
    return parser


def _measuring(command: argparse.ArgumentParser) -> None:
    command.add_argument("--only", choices=MODELS, action="append", help="this model; may be repeated")
    command.add_argument("--write", action="store_true", help="write the results into docs/scale.json")
    command.add_argument("--work", type=Path, default=WORK, help="for inputs and outputs [.bench/hollow]")


def _make(arguments: argparse.Namespace) -> None:
    if arguments.directory.exists():
        sys.exit(f"hollow: {arguments.directory} exists already; name another directory")
    place = planned.hollow(MODELS[arguments.model], arguments.directory, TARGETS)
    print(f"base: {place.base}")
    for targets, adapter in place.adapters.items():
        print(f"adapter, {targets}, rank {planned.RANKS[targets]}: {adapter}")


def _chosen(arguments: argparse.Namespace) -> list[Model]:
    return [model for name, model in MODELS.items() if name in (arguments.only or MODELS)]


def _plans(arguments: argparse.Namespace) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    for model in _chosen(arguments):
        rows = _told(planned.rows(model, arguments.work / model.name))
        if arguments.write:
            record("plans", rows, machine_line(machine(arguments.work)))


def _slices(arguments: argparse.Namespace) -> None:
    places = arguments.on.split(",")
    if unknown := sorted(set(places) - set(slices.PLACES)):
        sys.exit(f"hollow: --on knows {', '.join(slices.PLACES)}, not {', '.join(unknown)}")
    known = {":".join(case): case for case in slices.CASES}
    if unknown := sorted(set(arguments.case or ()) - set(known)):
        sys.exit(f"hollow: --case knows {', '.join(known)}, not {', '.join(unknown)}")
    cases = [known[name] for name in arguments.case or known]
    arguments.work.mkdir(parents=True, exist_ok=True)
    for model in _chosen(arguments):
        work = arguments.work / f"{model.name}-slice"
        rows = _told(slices.rows(model.slice(), work, places, cases, level=arguments.level))
        if arguments.write:
            record("slices", rows, machine_line(machine(arguments.work)))


def _told(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        found.append({name: _rounded(value) for name, value in row.items()})
        print(json.dumps(found[-1]), flush=True)
    return found


def _rounded(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def record(part: str, rows: list[dict[str, Any]], about: str) -> None:
    """Put rows in place of their older ones in the results, with the date and the machine of the newest."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    made = set(map(_key, rows))
    others = [row for row in results.get(part, {}).get("rows", ()) if _key(row) not in made]
    both = sorted(others + rows, key=_key)
    results[part] = {"date": time.strftime("%Y-%m-%d"), "machine": about, "rows": both}
    RESULTS.write_text(text_of(results))


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    """Return what a row is about, in the order of the tables."""
    orders = {
        "model": tuple(MODELS),
        "adapter": TARGETS,
        "out_storage": planned.STORAGES,
        "place": slices.PLACES,
    }
    return tuple(order.index(row[name]) if name in row else 0 for name, order in orders.items())


def text_of(results: dict[str, Any]) -> str:
    """Return results as JSON, with a line for each row."""
    parts = []
    for part, found in sorted(results.items()):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in found["rows"])
        head = f'"date": {json.dumps(found["date"])}, "machine": {json.dumps(found["machine"])}'
        parts.append(f'"{part}": {{{head}, "rows": [\n{rows}\n]}}')
    return "{" + ",\n".join(parts) + "}\n"


if __name__ == "__main__":
    main()
