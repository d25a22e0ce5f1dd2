"""The measured tables of ``docs/scale.md``, made of ``docs/scale.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supported import row

from hollows.models import MODELS, Model, Targets

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "scale.json"
WORDS: dict[str, str] = {"attention": "attention", "all": "all layers"}

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]

PLANS: tuple[Column, ...] = (
    ("model", lambda one: f"{one['model']}, {one['stored']}"),
    (
        "adapter, `--out-storage`",
        lambda one: f"{WORDS[one['adapter']]} r{one['rank']}, `{one['out_storage']}`",
    ),
    ("base: tensors", lambda one: _thousands(one["tensors"])),
    ("files", lambda one: str(one["files"])),
    ("GB", lambda one: f"{one['nbytes'] / 1e9:.1f}"),
    ("output: tensors", lambda one: _thousands(one["out_tensors"])),
    ("files", lambda one: str(one["out_files"])),
    ("GB", lambda one: f"{one['out_bytes'] / 1e9:.1f}"),
    ("changed", lambda one: _thousands(one["merged"])),
    ("wall s", lambda one: f"{one['wall_s']:.0f}" if one["wall_s"] >= 10 else f"{one['wall_s']:.1f}"),
    ("CPU s", lambda one: f"{one['cpu_s']:.1f}"),
    ("peak MB", lambda one: f"{one['peak_bytes'] / 1e6:.0f}"),
)
SLICES: tuple[Column, ...] = (
    ("slice of", lambda one: f"{one['model']}, {one['stored']}"),
    ("adapter, `--out-storage`", lambda one: f"{WORDS[one['adapter']]}, `{one['out_storage']}`"),
    ("where", lambda one: one["place"]),
    ("base MB", lambda one: f"{one['nbytes'] / 1e6:.0f}"),
    ("output MB", lambda one: f"{one['out_bytes'] / 1e6:.0f}"),
    ("merge: wall s", lambda one: f"{one['wall_s']:.1f}"),
    ("CPU s", lambda one: f"{one['cpu_s']:.1f}"),
    ("peak MB", lambda one: f"{one['peak_bytes'] / 1e6:.0f}"),
    ("verified", lambda one: one.get("level", "same bytes")),
    ("CPU s", lambda one: f"{one['verify_cpu_s']:.1f}" if "verify_cpu_s" in one else ""),
)
N_TEXTS = 2
"""Columns that are not numbers; `SLICES` has one more."""


def plans() -> str:
    """Return the table of dry runs."""
    found = _results("plans")
    return _table(PLANS, found["rows"], N_TEXTS) + _measured(found)


def slices() -> str:
    """Return the table of merges into slices."""
    found = _results("slices")
    made = [one for one in found["rows"] if "skipped" not in one]
    lacking = {one["place"]: one["skipped"] for one in found["rows"] if "skipped" in one}
    missing = "".join(f" Not measured on {place}: {why}." for place, why in lacking.items())
    return _table(SLICES, made, N_TEXTS + 1) + _measured(found).rstrip("\n") + missing + "\n"


def whole() -> str:
    """Return the table of processor time that whole models need, as their slices did on the disk."""
    rows = [
        row("model", "adapter, `--out-storage`", "values changed, slice", "CPU s", "values changed, model", "core hours"),
        "| --- | --- | ---: | ---: | ---: | ---: |\n",
    ]  # fmt: skip
    for one in _results("slices")["rows"]:
        if one["place"] != "disk":
            continue
        model, targets = MODELS[one["model"]], one["adapter"]
        few, many = changed_values(model.slice(), targets), changed_values(model, targets)
        hours = one["cpu_s"] * many / few / 3600
        rows.append(
            row(
                one["model"], f"{WORDS[targets]}, `{one['out_storage']}`", f"{few / 1e6:.0f}e6", f"{one['cpu_s']:.1f}",
                f"{many / 1e9:.1f}e9", f"{hours:.1f}" if hours >= 0.05 else "< 0.1",
            )
        )  # fmt: skip
    return "".join(rows)


def changed_values(model: Model, targets: Targets) -> int:
    """Return how many values of a model an adapter changes."""
    return sum(math.prod(module.shape) * module.n_experts for module in model.modules(targets))


def _results(part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))[part]
    return found


def _table(columns: tuple[Column, ...], rows: list[Row], n_texts: int) -> str:
    rule = "| " + " | ".join(["---"] * n_texts + ["---:"] * (len(columns) - n_texts)) + " |\n"
    lines = [row(*(text(one) for _, text in columns)) for one in rows]
    return "".join([row(*(title for title, _ in columns)), rule, *lines])


def _measured(found: dict[str, Any]) -> str:
    return f"\nMeasured on {found['date']}: {found['machine']}.\n"


def _thousands(number: int) -> str:
    return f"{number:,}".replace(",", " ")
