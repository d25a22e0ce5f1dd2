"""The arithmetic of the FAQ is right."""

from __future__ import annotations

import re
from pathlib import Path

FAQ = (Path(__file__).resolve().parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
PRODUCT = re.compile(r"([\d.]+)e9 × ([\d.]+) ns(?: / (\d))? = ([\d.]+) (s|min|h)\b")
DISK = re.compile(r"\| ([\d.]+) (s|min) \| 2 s \+ \(([\d.]+) \+ ([\d.]+)\)")
SECONDS = {"s": 1, "min": 60, "h": 3600}


def near(stated: str, computed: float) -> bool:
    """Return True if a number is what was computed, rounded to the digits that it has."""
    digits = len(stated.partition(".")[2])
    return abs(float(stated) - computed) <= 0.5 * 10**-digits + 1e-9


def test_times_of_the_disk():
    rows = DISK.findall(FAQ)

    assert len(rows) == 4
    for stated, unit, read, written in rows:
        assert near(stated, (2 + (float(read) + float(written)) / 2) / SECONDS[unit]), (stated, unit)


def test_times_of_the_processor():
    found = PRODUCT.findall(FAQ)

    assert len(found) == 3
    for values, nanoseconds, cores, stated, unit in found:
        assert near(stated, float(values) * float(nanoseconds) / int(cores or 1) / SECONDS[unit]), (
            stated,
            unit,
        )


def test_sizes_are_parameters_times_bytes():
    sizes = re.findall(r"\| ([\d.]+) GB \| ([\d.]+)e9 (?:parameters )?× 2", FAQ)

    assert len(sizes) == 2
    assert all(near(stated, float(n) * 2) for stated, n in sizes)
