"""Blocks that pages of several verbs share: notices, provenance, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_merge.peft_rules.method_names import method_name
from lora_merge.reporting.origin import adapter_files
from lora_merge.reporting.page import Bar, Fact, Facts, Notice, Notices, State, Table
from lora_merge.words import alike, counted

if TYPE_CHECKING:
    from lora_merge.core.report import Issue
    from lora_merge.reporting.origin import Origin

_RANKS: Mapping[str, int] = {"error": 0, "warning": 1, "note": 2}
"""Severity → its place in a list."""

_MOST_NOTICES = 200
"""Most groups of notices that a page shows; its data have all of them."""


def notices(issues: Sequence[Issue]) -> Notices:
    """Return issues as notices: errors first, similar ones together."""
    groups = sorted(alike(issues), key=lambda group: _RANKS[group.first.severity])
    rows = [Notice(one.first.severity, one.subject, one.sentence, one.hint) for one in groups[:_MOST_NOTICES]]
    if left := len(groups) - len(rows):
        rows.append(
            Notice("note", "", f"{counted(left, 'other kind')} of messages are in the data of this page")
        )
    return Notices(tuple(rows))


def worst(issues: Sequence[Issue]) -> State:
    """Return the state that issues give a result that passed otherwise."""
    found = {issue.severity for issue in issues}
    return "bad" if "error" in found else "warn" if "warning" in found else "good"


def with_warnings(issues: Sequence[Issue]) -> str:
    """Return the end of a sentence that counts warnings; empty without any."""
    n = sum(issue.severity == "warning" for issue in issues)
    return f", with {counted(n, 'warning')}" if n else ""


def times(seconds: Mapping[str, float]) -> Table:
    """Return a table of phases."""
    most = max(seconds.values(), default=0.0) or 1.0
    rows = tuple((phase, Bar(f"{took:.2f} s", took / most)) for phase, took in seconds.items())
    return Table("Wall time of each phase", ("Phase", "Time"), rows, is_titled=True)


def provenance(origin: Origin) -> tuple[Facts, Table | None, Table | None]:
    """Return what an output's manifest says of its inputs: versions and options, the adapters, the other files."""
    manifest = origin.manifest
    if manifest is None:
        return Facts(()), None, None
    base = manifest.base
    facts = [
        *(Fact(name, str(version)) for name, version in manifest.versions.items()),
        Fact("base", base.path, is_code=True),
        *([Fact("base commit", base.commit, is_code=True)] if base.commit else []),
        *(
            Fact(f"option {name}", str(value))
            for name, value in manifest.options.items()
            if value is not None
        ),
    ]
    return Facts(tuple(facts)), _adapters(origin), _side_files(origin)


def _adapters(origin: Origin) -> Table | None:
    assert origin.manifest is not None
    entries = origin.table.get("adapters", [])
    rows = tuple(
        (
            one.path + (f"@{one.commit}" if one.commit else ""),
            f"{one.weight:g}",
            _settings(entry),
            one.digest,
            tuple(adapter_files(one.path)),
        )
        for one, entry in zip(origin.manifest.adapters, entries, strict=True)
    )
    columns = ("Adapter", "Weight", "Settings", "Digest", "Files")
    return Table("Adapters", columns, rows, frozenset({1}), frozenset({0, 3})) if rows else None


def _settings(entry: Any) -> str:
    """Return the few settings of an adapter that users compare."""
    config = entry.get("config") if isinstance(entry, dict) else None
    if not isinstance(config, dict):
        return ""
    kind = "DORA" if config.get("use_dora") else str(config.get("peft_type", ""))
    shown = [
        (name, config.get(key)) for name, key in (("r", "r"), ("α", "lora_alpha"), ("PEFT", "peft_version"))
    ]
    parts = [method_name(kind), *(f"{name} {value}" for name, value in shown if value is not None)]
    parts += ["rsLoRA"] if config.get("use_rslora") else []
    return ", ".join(filter(None, parts))


def _side_files(origin: Origin) -> Table | None:
    assert origin.manifest is not None
    rows = tuple((name, file.origin, file.digest) for name, file in origin.manifest.side_files.items())
    return (
        Table("Files beside the weights", ("File", "From", "Digest"), rows, code=frozenset({0, 2}))
        if rows
        else None
    )
