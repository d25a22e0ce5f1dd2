"""Two records of what test suites made, compared."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from digesting.directories import Files

SHARED = "(shared)"
"""Stands for the test where a directory belongs to a whole file of tests: bases and adapters, made by whoever asks first."""

Test = dict[str, Any]
"""``outcome``, ``exits`` of its commands, and what it ``made``: path → versions, each a directory's `Files`."""


@dataclass(slots=True)
class Comparison:
    """What was compared, and every difference."""

    n_tests: int = 0
    n_commands: int = 0
    n_files: int = 0
    n_bytes: int = 0
    moved: list[tuple[str, str]] = field(default_factory=list)
    """Tests of another file by now."""

    differences: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def differs(self, kind: str, where: str, what: str) -> None:
        """Note a difference."""
        self.kinds[kind] += 1
        self.differences.append(f"{kind}: {where}: {what}")

    def __str__(self) -> str:
        lines = [f"matched by its name: {old} -> {new}" for old, new in self.moved]
        lines += self.differences
        lines.append(
            f"compared: {self.n_tests} tests, {self.n_commands} commands, {self.n_files} files, {self.n_bytes} bytes"
        )
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
        lines.append(f"{len(self.differences)} differences: {kinds}" if kinds else "no difference")
        return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """Return a record."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def summary(record: dict[str, Any]) -> str:
    """Return how much a record holds."""
    made = [
        files for test in record["tests"].values() for versions in test["made"].values() for files in versions
    ]
    n_bytes = sum(size for files in made for size, _ in files.values())
    n_files = sum(map(len, made))
    return f"{len(record['tests'])} tests, {len(made)} directories, {n_files} files, {n_bytes} bytes"


def complaints(record: dict[str, Any]) -> list[str]:
    """Return the tests that did not pass, and what could not be recorded."""
    outcomes = {name: test["outcome"] for name, test in record["tests"].items()}
    failed = [
        f"{name}: {outcome}"
        for name, outcome in outcomes.items()
        if "failed" in outcome or (not outcome and SHARED not in name)
    ]
    return [*failed, *record["faults"], *(f"{file}: {reason}" for file, reason in record["not run"].items())]


def part_of(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return of a record what the files of tests made that the other ran, wherever these are by now."""
    stems = {Path(file).stem for file in new["files"]}

    def belongs(name: str) -> bool:
        return Path(name.partition("::")[0]).stem in stems

    return old | {
        "tests": {name: test for name, test in old["tests"].items() if belongs(name)},
        "files": [file for file in old["files"] if belongs(file)],
        "not run": {file: reason for file, reason in old["not run"].items() if belongs(file)},
    }


def compare(old: dict[str, Any], new: dict[str, Any]) -> Comparison:
    """Return every difference between two records: nothing that is on one side alone is left out."""
    result = Comparison()
    for side, record in (("old", old), ("new", new)):
        for fault in record["faults"]:
            result.differs("not recorded", f"{side} record", fault)
        for file, reason in record["not run"].items():
            result.differs("not recorded", f"{side} record", f"{file}: {reason}")
    if old["root"] != new["root"]:
        result.differs(
            "not recorded", "root", f"{old['root']} and {new['root']}: digests of paths will differ"
        )
    pairs = _matched(old["tests"], new["tests"], result)
    for before, after in pairs:
        _compare_test(after, old["tests"][before], new["tests"][after], result)
    return result


def _matched(old: dict[str, Test], new: dict[str, Test], result: Comparison) -> list[tuple[str, str]]:
    """Return the tests of both records, by their ids, or by their names where that is only one test."""
    pairs = [(name, name) for name in old if name in new]
    gone, come = ([name for name in one if name not in other] for one, other in ((old, new), (new, old)))
    by_name: dict[str, list[str]] = {}
    for name in come:
        by_name.setdefault(name.partition("::")[2], []).append(name)
    n_gone = Counter(name.partition("::")[2] for name in gone)
    for name in gone:
        short = name.partition("::")[2]
        candidates = by_name.get(short, [])
        if not short.startswith("(") and len(candidates) == n_gone[short] == 1:
            pairs.append((name, candidates[0]))
            result.moved.append((name, candidates[0]))
            come.remove(candidates[0])
        else:
            result.differs("missing test", name, f"is in the old record alone{_made(old[name])}")
    for name in come:
        result.differs("additional test", name, f"is in the new record alone{_made(new[name])}")
    return pairs


def _made(test: Test) -> str:
    n_files = sum(len(files) for versions in test["made"].values() for files in versions)
    return f" ({test['outcome'] or 'no test'}, {n_files} files)"


def _compare_test(name: str, old: Test, new: Test, result: Comparison) -> None:
    result.n_tests += 1
    if old["outcome"] != new["outcome"]:
        result.differs("outcome", name, f"{old['outcome']}, now {new['outcome']}")
    if old["exits"] != new["exits"]:
        result.differs("exit codes", name, f"{old['exits']}, now {new['exits']}")
    result.n_commands += min(len(old["exits"]), len(new["exits"]))
    for place in sorted(old["made"].keys() | new["made"].keys()):
        before, after = old["made"].get(place, []), new["made"].get(place, [])
        if len(before) != len(after):
            what = f"was made {len(before)} times, now {len(after)} times"
            kind = "missing directory" if len(after) < len(before) else "additional directory"
            result.differs(kind, f"{name} {place}", what)
        for n, (one, other) in enumerate(zip(before, after, strict=False)):
            _compare_files(f"{name} {place}{f' #{n + 1}' if n else ''}", one, other, result)


def _compare_files(where: str, old: Files, new: Files, result: Comparison) -> None:
    for file in sorted(old.keys() | new.keys()):
        if file not in new:
            result.differs("missing file", f"{where}/{file}", "is in the old record alone")
        elif file not in old:
            result.differs("additional file", f"{where}/{file}", "is in the new record alone")
        else:
            result.n_files += 1
            result.n_bytes += old[file][0]
            if old[file] != new[file]:
                result.differs("file", f"{where}/{file}", _differing(*old[file], *new[file]))


def _differing(n_before: int, before: dict[str, str], n_after: int, after: dict[str, str]) -> str:
    """Return which parts of a file differ."""
    size = f"{n_before} bytes, now {n_after}" if n_before != n_after else f"{n_before} bytes"
    parts = [
        part for part in sorted(before.keys() | after.keys()) if part and before.get(part) != after.get(part)
    ]
    if not parts:
        return size
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return f"{size}; {', '.join(parts[:4])}{more}"
